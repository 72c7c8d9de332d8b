"""Random numbers of a traced step: the same bits in every engine, and the functions as they were afterwards."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from loop_models import ENGINES, Counting, data, fresh

import tfloop
from tfloop.loop.random_numbers import same_everywhere
from tfloop.step import Step, running

SHAPE = (301, 7)

# Each looks its function up when it draws, as Keras does.
SAME_BITS = {
    "uniform": lambda seed: tf.random.stateless_uniform(SHAPE, seed),
    "uniform float64": lambda seed: tf.random.stateless_uniform(SHAPE, seed, dtype=tf.float64),
    "uniform float16": lambda seed: tf.random.stateless_uniform(SHAPE, seed, dtype=tf.float16),
    "uniform bfloat16": lambda seed: tf.random.stateless_uniform(SHAPE, seed, dtype=tf.bfloat16),
    "integers": lambda seed: tf.random.stateless_uniform(SHAPE, seed, 0, 17, dtype=tf.int32),
    "dropout": lambda seed: tf.nn.experimental.stateless_dropout(tf.ones(SHAPE), 0.3, seed),
    "dropout of rows": lambda seed: tf.nn.experimental.stateless_dropout(
        tf.ones(SHAPE), 0.3, seed, noise_shape=(301, 1)
    ),
    "algorithm given": lambda seed: tf.random.stateless_uniform(SHAPE, seed, 0, 9, dtype=tf.int64, alg="philox"),
}
NEARLY = {
    "normal": lambda seed: tf.random.stateless_normal(SHAPE, seed),
    "shifted normal": lambda seed: tf.random.stateless_normal(SHAPE, seed, 3.0, 2.0),
    "uniform in a range": lambda seed: tf.random.stateless_uniform(SHAPE, seed, -2.0, 3.0),
}


def drawn(draw, jit_compile):
    """Draws in a traced step. The seed is an argument: a constant would be folded before XLA sees it."""

    def step(seed):
        with same_everywhere(), running(Step()):
            return draw(seed)

    return tf.function(step, jit_compile=jit_compile, autograph=False)(tf.constant([12345, 678])).numpy()


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", SAME_BITS)
def test_bits_are_those_of_tensorflow(name, jit_compile):
    draw = SAME_BITS[name]
    np.testing.assert_array_equal(drawn(draw, jit_compile), draw([12345, 678]).numpy())


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", NEARLY)
def test_numbers_are_those_of_tensorflow_up_to_rounding(name, jit_compile):
    draw = NEARLY[name]
    np.testing.assert_allclose(drawn(draw, jit_compile), draw([12345, 678]).numpy(), atol=1e-5)


def test_tensorflow_alone_draws_other_floats_under_xla():
    """When this fails, XLA has learnt to draw as the kernels do, and half of `random_numbers` can go."""
    seed = tf.Variable([12345, 678], dtype=tf.int32)
    draw = lambda: tf.random.stateless_uniform(SHAPE, seed.read_value())
    assert (tf.function(draw, jit_compile=True)().numpy() != draw().numpy()).any()


def test_functions_are_replaced_in_traced_steps_only():
    names = [(tf.random, n) for n in ("stateless_uniform", "stateless_normal", "stateless_truncated_normal")]
    names.append((tf.nn.experimental, "stateless_dropout"))
    before = [getattr(owner, name) for owner, name in names]
    types = []

    @tf.function(autograph=False)
    def no_step(seed):
        types.extend(op.type for op in tf.random.stateless_uniform((2,), seed).graph.get_operations())

    with same_everywhere():
        no_step(tf.constant([1, 2]))
        with pytest.raises(RuntimeError), running(Step()):
            raise RuntimeError
    assert "Bitcast" not in types
    assert [getattr(owner, name) for owner, name in names] == before


class Noisy(Counting):
    """Draws noise of every kind that is promised to be the same."""

    def __init__(self):
        super().__init__(dropout=0.4)
        self.noise = layers.GaussianNoise(0.3)
        self.draws = keras.random.SeedGenerator(3)

    def call(self, x, training=None):
        x = self.noise(x, training=training) + 0.1 * keras.random.uniform(ops.shape(x), seed=self.draws)
        return super().call(x, training=training)


def test_models_with_random_layers_train_alike_in_every_engine():
    x, y = data(40)
    found = {}
    for engine, options in ENGINES.items():
        model = fresh(Noisy, **options)
        model.fit(x, y, batch_size=4, epochs=3, verbose=0)
        found[engine] = [np.array(w) for w in model.get_weights()]
        assert model.engine == engine
    for engine in ("graph", "jit", "scan"):
        for ours, eager in zip(found[engine], found["eager"], strict=True):
            np.testing.assert_allclose(ours, eager, rtol=1e-3, atol=1e-5)


def test_dropout_is_what_keras_fit_draws():
    x, y = data(12)
    losses = []
    for base, options in ((keras.Model, {}), (tfloop.Model, {"jit_compile": "loop"})):
        tfloop.set_seed(0)
        inputs = keras.Input((6,))
        model = base(inputs, layers.Dense(3)(layers.Dropout(0.5)(inputs)))
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
        losses.append(model.fit(x, y, batch_size=4, shuffle=False, epochs=2, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
