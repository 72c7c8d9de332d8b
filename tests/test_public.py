"""One table of every public name. What it makes must work everywhere; a name missing from the table fails."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfloop

RNG = np.random.default_rng(0)


class Added(tfloop.Layer):
    """A layer that uses what `tfloop.Layer` adds."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        h = self.dense(x)
        self.add_loss(1e-3 * ops.mean(h**2), name="size")
        self.add_metric(ops.mean(h**2), name="power")
        return tfloop.tag(h, "tagged")


class Subclassed(tfloop.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, x):
        h = self.dense(x)
        self.add_loss(1e-3 * ops.mean(h**2), name="size")
        self.add_metric(h**2, name="power")
        return h


def parametrized(parametrization, **dense):
    return lambda: tfloop.Parametrized(layers.Dense(3, **dense), {"kernel": parametrization()})


keras.saving.register_keras_serializable("test_public")(Added)


@keras.saving.register_keras_serializable("test_public")
def halved(weight):
    return 0.5 * weight


@dataclasses.dataclass(frozen=True)
class Entry:
    """`layer` makes a layer or model that takes (batch, 4) and gives (batch, 3), built on the name's object.

    A name that makes none (`why`) is shown to work in the file that is named.
    """

    layer: Callable | None = None
    why: str = ""
    saves: bool = True  # in a `.keras` file; what needs the class registered is registered here


TABLE = {
    "Layer": Entry(Added),
    "Model": Entry(Subclassed, saves=False),
    "SpectralNormalization": Entry(lambda: tfloop.SpectralNormalization(layers.Dense(3))),
    "Parametrized": Entry(parametrized(lambda: [tfloop.Centered(), tfloop.UnitNorm()])),
    "SpectralNorm": Entry(parametrized(tfloop.SpectralNorm)),
    "WeightNorm": Entry(parametrized(tfloop.WeightNorm)),
    "UnitNorm": Entry(parametrized(tfloop.UnitNorm)),
    "MaxNorm": Entry(parametrized(lambda: tfloop.MaxNorm(0.5))),
    "Centered": Entry(parametrized(tfloop.Centered)),
    "Orthogonal": Entry(parametrized(tfloop.Orthogonal)),
    "Bounded": Entry(parametrized(lambda: tfloop.Bounded(-2.0, 2.0))),
    "NonNegative": Entry(parametrized(tfloop.NonNegative, kernel_initializer=keras.initializers.RandomUniform(0.1, 1))),
    "Function": Entry(parametrized(lambda: tfloop.Function(halved))),
    "Parametrization": Entry(why="tests/weights: the base class of those above"),
    "bake": Entry(why="tests/weights"),
    "warm_start": Entry(why="tests/weights"),
    "Tensors": Entry(why="tests/test_tensors.py"),
    "capture": Entry(why="tests/test_tensors.py"),
    "tag": Entry(why="tests/test_tensors.py, and `Layer` above"),
    "register_statistic": Entry(why="tests/test_statistics.py"),
    "Progress": Entry(why="tests/test_progress.py"),
    "progress": Entry(why="tests/test_progress.py"),
    "fingerprint": Entry(why="tests/test_reproducibility.py"),
    "set_seed": Entry(why="tests/test_reproducibility.py"),
    "WeightAverage": Entry(why="tests/test_averaging.py: it makes no layer"),
    "averaged": Entry(why="tests/test_averaging.py"),
    "average": Entry(why="tests/test_weight_mean.py"),
    "reestimate_batch_norm": Entry(why="tests/test_batch_norm.py"),
    "numpy_loss": Entry(why="tests/test_numpy_loss.py: not compiled by XLA, by contract"),
    "without_inputs": Entry(why="tests/test_prediction.py"),
    "Run": Entry(why="tests/runs"),
    "binary": Entry(why="tests/runs"),
}
MAKERS = [name for name, entry in TABLE.items() if entry.layer]


def test_every_public_name_is_in_the_table():
    assert not set(tfloop.__all__) - set(TABLE), "a public name without an entry"
    assert not [name for name in TABLE if not hasattr(tfloop, name)], "an entry without a public name"
    assert all(entry.layer or entry.why for entry in TABLE.values())


def data(batch=5):
    return RNG.normal(size=(batch, 4)).astype("float32")


@pytest.fixture(params=MAKERS)
def layer(request):
    keras.utils.set_random_seed(0)
    made = TABLE[request.param].layer()
    made(data())
    return made


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_in_a_function_as_eagerly(layer, jit, training):
    x = data()
    compiled = tf.function(lambda x: layer(x, training=training), jit_compile=jit)
    takes_training = not isinstance(layer, Added | Subclassed)
    eager = layer(x, training=training) if takes_training else layer(x)
    result = compiled(x) if takes_training else tf.function(lambda x: layer(x), jit_compile=jit)(x)
    np.testing.assert_allclose(result, eager, rtol=2e-2 if training else 1e-5, atol=1e-6)


def test_the_second_call_traces_nothing(layer):
    traces = []

    @tf.function
    def call(x):
        traces.append(1)
        return layer(x)

    call(data())
    call(data())
    assert len(traces) == 1


def test_batches_of_unknown_size(layer):
    call = tf.function(lambda x: layer(x), input_signature=[tf.TensorSpec((None, 4))])
    assert call(data(5)).shape == (5, 3)
    assert call(data(1)).shape == (1, 3)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", MAKERS)
def test_in_mixed_precision_weights_stay_float32(name, policy):
    keras.config.set_dtype_policy(policy)
    try:
        layer = TABLE[name].layer()
        output = layer(data())
        assert keras.backend.standardize_dtype(output.dtype) == policy.removeprefix("mixed_")
        assert {keras.backend.standardize_dtype(v.dtype) for v in layer.trainable_weights} == {"float32"}
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    "mode", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": "step"}, {"jit_compile": "loop"}], ids=str
)
@pytest.mark.parametrize("name", MAKERS)
def test_trains_in_the_loop_with_a_short_last_batch(name, mode):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = tfloop.Model(inputs, TABLE[name].layer()(inputs))
    model.compile(keras.optimizers.SGD(0.05), "mse", **mode)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 4)).astype("float32"), rng.normal(size=(10, 3)).astype("float32")
    history = model.fit(x, y, batch_size=4, epochs=4, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < history[0]


@pytest.mark.parametrize("name", [n for n in MAKERS if TABLE[n].saves])
def test_saved_and_loaded_it_gives_the_same(name, tmp_path):
    inputs = keras.Input((4,))
    model = tfloop.Model(inputs, TABLE[name].layer()(inputs))
    x = data()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)
    model.save_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(model)
    clone.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(clone.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in MAKERS if TABLE[n].saves])
def test_its_config_makes_it_again(name):
    layer = TABLE[name].layer()
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
