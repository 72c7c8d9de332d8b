"""The mechanism: what a forward pass reads, and that nothing else changes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfloop import weights
from tfloop.model import Model
from tfloop.step import Step, running


def rng(seed=0):
    return np.random.default_rng(seed)


def data(*shape, seed=0):
    return rng(seed).standard_normal(shape).astype("float32")


def dense(units=3, inputs=4, **kwargs):
    layer = weights.SpectralNormalization(layers.Dense(units, use_bias=False), **kwargs)
    layer.build((None, inputs))
    return layer


def u_of(layer):
    return [v for v in layer.weights if v.name == "u"]


def values(variables):
    return [v.numpy().copy() for v in variables]


def moved(layer, before):
    return any(np.any(a != b) for a, b in zip(values(u_of(layer)), before, strict=True))


class Counted(weights.Parametrization):
    """The identity, which counts how often it was computed in Python and how often its state moved."""

    computed = 0

    def build(self, shape):
        self.add_state("moves", (), "zeros")

    def call(self, raw, training=False):
        Counted.computed += 1
        if training is not False:
            self.once_a_step(lambda: self.moves.assign_add(1.0))
        return raw * 1.0


def counted(layer, name="kernel"):
    Counted.computed = 0
    return weights.Parametrized(layer, {name: Counted()})


def moves(layer):
    return [v.numpy() for v in layer.weights if v.name == "moves"]


# When state moves --------------------------------------------------------------------------------


def test_u_moves_in_training_only():
    layer, x = dense(), data(2, 4)
    layer.layer.kernel.assign(data(4, 3))
    before = values(u_of(layer))
    layer(x)
    layer(x, training=False)
    assert not moved(layer, before)
    layer(x, training=True)
    assert moved(layer, before)


@pytest.mark.parametrize(
    "freeze", [lambda l: setattr(l, "trainable", False), lambda l: setattr(l.layer, "trainable", False)]
)
def test_a_frozen_weight_is_normalised_and_does_not_move_u(freeze):
    layer, x = dense(), data(2, 4)
    freeze(layer)
    layer.layer.kernel.assign(data(4, 3))
    before = values(u_of(layer))
    layer(x, training=True)
    assert not moved(layer, before)
    weights.warm_start(layer)
    np.testing.assert_allclose(np.linalg.norm(layer(np.eye(4)), 2), 1.0, rtol=1e-2)


def test_trained_state_is_frozen_and_thawed_with_its_weight():
    wrapper = weights.Parametrized(layers.Dense(3, use_bias=False), {"kernel": weights.WeightNorm()})
    wrapper.build((None, 4))
    alone = layers.Dense(3, use_bias=False)
    alone.build((None, 4))
    weights.parametrize(alone, "kernel", "weight_norm")
    for layer, kernel in ((wrapper, wrapper.layer.kernel), (alone, alone.kernel)):
        for frozen in (kernel, getattr(layer, "layer", layer), layer):
            frozen.trainable = False
            assert layer.trainable_weights == []
            frozen.trainable = True
            assert [v.name for v in layer.trainable_weights] == ["kernel", "g"]


def test_trained_state_of_a_network_in_two_models_is_trained_as_compiled():
    critic = Model(x := keras.Input((4,)), layers.Dense(1)(x))
    critic.parametrize("*/kernel", "weight_norm")
    critic.compile("sgd", "mse")
    critic.trainable = False
    generator = Model(z := keras.Input((2,)), critic(layers.Dense(4)(z)))
    generator.compile("sgd", "mse")
    state = critic.layers[1].kernel_weight_norm.g
    for model, x, trained in (
        (generator, data(8, 2), False),
        (critic, data(8, 4), True),
        (generator, data(8, 2), False),
    ):
        before = state.numpy()
        model.fit(x, np.ones((8, 1)), verbose=0)
        assert np.any(state.numpy() != before) == trained and critic.trainable_weights == []


@pytest.mark.parametrize(
    ("kind", "training", "expected"),
    [
        ("train", None, 1),
        ("train", True, 1),
        ("train", False, 0),
        ("test", None, 0),
        ("test", True, 0),
        ("predict", True, 0),
    ],
)
def test_the_step_decides_where_nobody_says_training(kind, training, expected):
    layer = counted(layers.Dense(3))
    layer.build((None, 4))
    with running(Step(kind)):
        layer(data(2, 4), training=training)
        layer(data(2, 4), training=training)
    assert moves(layer) == [expected]


def test_outside_a_step_each_training_call_is_one():
    layer = counted(layers.Dense(3))
    for _ in range(3):
        layer(data(2, 4), training=True)
    assert moves(layer) == [3]


def test_training_comes_from_the_call_around():
    layer = counted(layers.Dense(3))
    model = keras.Sequential([keras.Input((4,)), layer])
    model(data(2, 4), training=True)
    model(data(2, 4))
    model.predict(data(2, 4), verbose=0)
    assert moves(layer) == [1]


def test_one_effective_weight_for_all_calls_of_a_step():
    layer = dense()
    layer.layer.kernel.assign(data(4, 3))
    eye = np.eye(4, dtype="float32")
    with running(Step()):
        real, fake = layer(eye, training=True), layer(eye, training=True)
        inference = layer(eye, training=False)
    np.testing.assert_array_equal(real, fake)
    np.testing.assert_array_equal(real, inference)


# What is read, and what is not written -----------------------------------------------------------


def test_no_forward_pass_writes_the_raw_weight():
    layer, x = dense(), data(2, 4)
    before = layer.layer.kernel.numpy().tobytes()
    layer(x, training=True)
    layer(x, training=False)
    tf.function(layer)(x, training=True)
    with running(Step()):
        layer(x, training=True)
    assert layer.layer.kernel.numpy().tobytes() == before


def test_outside_a_call_the_raw_weight_is_read():
    layer = weights.Parametrized(
        layers.Dense(
            3,
            kernel_regularizer=keras.regularizers.L2(1.0),
            kernel_constraint=keras.constraints.NonNeg(),
        ),
        {"kernel": weights.Function(lambda raw: 0.0 * raw)},
    )
    layer.build((None, 4))
    kernel = layer.layer.kernel
    assert not layer(data(2, 4)).numpy().any()
    assert np.abs(kernel.numpy()).sum() > 0
    np.testing.assert_allclose(layer.losses[0], np.sum(kernel.numpy() ** 2), rtol=1e-6)
    keras.optimizers.SGD(0.0).apply([tf.zeros((4, 3))], [kernel])
    assert kernel.numpy().min() >= 0 and kernel.numpy().max() > 0


def test_a_weight_read_by_another_layer_is_the_effective_one():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = layers.Embedding(5, 3)

        def call(self, ids):
            return ops.matmul(self.embedding(ids), ops.transpose(self.embedding.embeddings))

    model = Tied()
    model(np.array([[0]]))
    raw = model.embedding.embeddings.numpy()
    assert weights.parametrize(model, "embeddings", lambda raw: 2.0 * raw) == ["embedding/embeddings"]
    np.testing.assert_allclose(model(np.arange(5)), 4 * raw @ raw.T, rtol=1e-5)


def test_every_other_state_moves_exactly_once():
    """Batch statistics, seeds, metrics and added losses of the layers around the weight."""

    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3, activity_regularizer=keras.regularizers.L2(1.0))
            self.norm = layers.BatchNormalization(momentum=0.5)
            self.dropout = layers.Dropout(0.5, seed=1)
            self.calls = keras.metrics.Sum()

        def build(self, shape):
            self.dense.build(shape)
            self.norm.build((None, 3))

        def call(self, x, training=False):
            self.calls.update_state(1.0)
            self.add_loss(ops.sum(x))
            return self.dropout(self.norm(self.dense(x), training=training), training=training)

    x = data(8, 4)
    plain, block = Block(), Block()
    plain.build(x.shape)
    block.build(x.shape)
    block.set_weights(plain.get_weights())
    layer = weights.Parametrized(block, {"dense/kernel": lambda raw: raw + 0.0})
    for call in (lambda l: l(x, training=True), tf.function(lambda l: l(x, training=True))):
        np.testing.assert_allclose(call(layer), call(plain), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(block.norm.moving_mean, plain.norm.moving_mean, rtol=1e-5)
        assert block.calls.result() == plain.calls.result()
        np.testing.assert_array_equal(block.dropout.seed_generator.state, plain.dropout.seed_generator.state)
    layer(x, training=True)
    plain(x, training=True)
    np.testing.assert_allclose(layer.losses, plain.losses, rtol=1e-5)
    assert len(layer.losses) == 2
    np.testing.assert_allclose(block.dense.losses, plain.dense.losses, rtol=1e-5)


# Gradients ---------------------------------------------------------------------------------------


def test_the_gradient_passes_through_and_is_orthogonal_to_the_weight():
    layer, x = dense(), data(5, 4)
    kernel = layer.layer.kernel
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, training=True) ** 3)
    gradient = tape.gradient(loss, layer.trainable_weights)[0].numpy()
    assert abs(np.sum(gradient * kernel.numpy())) < 1e-5 * np.linalg.norm(gradient)


@pytest.mark.parametrize("compiled", [None, False, True])
def test_two_tapes_and_an_update_between(compiled):
    """D(real), D(fake), an update of D, then D(fake) again under another tape, in one step."""
    layer, x = dense(), data(5, 4)
    layer.layer.kernel.assign(data(4, 3))
    kernel = layer.layer.kernel

    def step():
        with running(Step()):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(layer(x, training=True) ** 2) - tf.reduce_sum(layer(2 * x, training=True))
            first = tape.gradient(loss, kernel.value)
            kernel.assign_sub(0.1 * first)
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(layer(x, training=True) ** 3)
            return first, tape.gradient(loss, kernel.value)

    raw = kernel.numpy()
    u = u_of(layer)[0].numpy()
    run = step if compiled is None else tf.function(step, jit_compile=compiled)
    first, second = (t.numpy() for t in run())

    def oracle(weight, f):
        w = tf.Variable(weight)
        v = u_of(layer)[0].numpy()[0]
        with tf.GradientTape() as tape:
            image = tf.linalg.matvec(w, tf.constant(v))
            direction = tf.stop_gradient(image / tf.norm(image))
            loss = f(x @ (w / tf.reduce_sum(direction * image)))
        return tape.gradient(loss, w).numpy()

    assert np.any(u_of(layer)[0].numpy() != u)
    np.testing.assert_allclose(
        first,
        oracle(raw, lambda y: tf.reduce_sum(y**2) - 2 * tf.reduce_sum(y)),
        rtol=1e-4,
        atol=1e-4,
    )
    np.testing.assert_allclose(second, oracle(kernel.numpy(), lambda y: tf.reduce_sum(y**3)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kernel.numpy(), raw - 0.1 * first, rtol=1e-5)


def test_a_gradient_penalty_differentiates_twice():
    layer, x = dense(), tf.constant(data(5, 4))
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = tf.reduce_sum(tf.tanh(layer(x, training=True)))
        penalty = tf.reduce_sum(inner.gradient(y, x) ** 2)
    assert np.abs(outer.gradient(penalty, layer.trainable_weights)[0]).max() > 0


# Graphs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_over_steps(compiled):
    layer, x = counted(layers.Dense(3)), data(2, 4)
    layer.build((None, 4))

    @tf.function(jit_compile=compiled)
    def chunk(n):
        def body(i, total):
            with running(Step()):
                y = layer(x, training=True) + layer(x, training=True)
            return i + 1, total + tf.reduce_sum(y)

        return tf.while_loop(lambda i, _: i < n, body, (0, 0.0))

    chunk(tf.constant(5))
    assert moves(layer) == [5]
    assert Counted.computed == 2 + 1  # once a call, and the check of the shape


def test_a_branch_and_then_the_same_layer_outside():
    layer, x = dense(), data(2, 4)
    layer.layer.kernel.assign(data(4, 3))

    @tf.function
    def step(flag):
        with running(Step()):
            inside = tf.cond(flag, lambda: layer(x, training=True), lambda: layer(x, training=True))
            return inside, layer(x, training=True)

    for flag in (True, False):
        inside, outside = step(tf.constant(flag))
        np.testing.assert_allclose(inside, outside, rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "inner",
    [
        lambda call, n: tf.cond(n > 0, call, lambda: 0.0),
        lambda call, n: tf.while_loop(lambda i, _: i < n, lambda i, _: (i + 1, call()), (0, 0.0))[1],
        lambda call, n: tf.cond(n > 0, lambda: tf.cond(n > 1, call, lambda: 1.0), call),
    ],
    ids=["branch", "loop", "branches"],
)
def test_state_moves_once_a_step_whichever_branch_is_taken(inner, compiled):
    layer, x = counted(layers.Dense(3)), data(2, 4)
    layer.build((None, 4))
    call = lambda: tf.reduce_sum(layer(x, training=True))

    @tf.function(jit_compile=compiled)
    def chunk(n):
        def body(i, _):
            with running(Step()):
                return i + 1, inner(call, n) + call()

        return tf.while_loop(lambda i, _: i < 2, body, (0, 0.0))

    for steps, n in enumerate([0, 1, 2], start=1):
        chunk(tf.constant(n))
        assert moves(layer) == [2 * steps]


def test_a_move_in_a_function_counts_there_only():
    layer, x = counted(layers.Dense(3)), data(2, 4)
    layer.build((None, 4))
    inner = tf.function(lambda: layer(x, training=True) + layer(2 * x, training=True))

    @tf.function
    def step(flag):
        with running(Step()):
            return tf.cond(flag, inner, lambda: tf.zeros((2, 3))) + layer(x, training=True)

    step(tf.constant(False))
    assert moves(layer) == [1]


def test_a_function_inside_a_function():
    layer, x = dense(), data(2, 4)
    inner = tf.function(lambda v: layer(v, training=True))

    @tf.function
    def outer(v):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(inner(v) ** 2) + tf.reduce_sum(layer(v, training=True))
        return tape.gradient(loss, layer.trainable_weights)

    assert np.isfinite(outer(x)[0]).all()


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda unroll: counted(layers.LSTM(3, unroll=unroll), "*kernel"),
        lambda unroll: layers.RNN(counted(layers.LSTMCell(3), "*kernel"), unroll=unroll),
    ],
    ids=["layer", "cell"],
)
def test_a_recurrent_weight_is_made_once_outside_the_loop(make, unroll, traced):
    layer, x = make(unroll), data(2, 6, 4)
    layer.build(x.shape)
    Counted.computed = 0
    run = tf.function(lambda: layer(x, training=True)) if traced else lambda: layer(x, training=True)
    run()
    assert moves(layer) == [1, 1]
    assert Counted.computed == 2
    run()
    assert moves(layer) == [2, 2]


def test_time_distributed_makes_it_once():
    layer = layers.TimeDistributed(counted(layers.Dense(3)))
    layer.build((2, 5, 4))
    layer(data(2, 5, 4), training=True)
    tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec((None, None, 4))])(data(2, 5, 4))
    assert moves(layer) == [2]


def test_a_users_own_loop_over_a_layer():
    class Repeated(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, x, training=False):
            body = lambda i, h: (i + 1, self.dense(h))
            return tf.while_loop(lambda i, h: i < 3, body, (0, x))[1]

    model = Repeated()
    model(data(2, 4))
    weights.parametrize(model, "*/kernel", Counted())
    Counted.computed = 0
    tf.function(model)(tf.constant(data(2, 4)), training=True)
    assert moves(model) == [1] and Counted.computed == 1


def test_a_stateless_call_of_keras():
    layer, x = dense(), data(2, 4)
    doubled = [2 * v.numpy() for v in layer.trainable_variables]
    before = values(layer.weights)
    outputs, others = layer.stateless_call(doubled, [v.value for v in layer.non_trainable_variables], x, training=True)
    np.testing.assert_allclose(outputs, layer(x), rtol=1e-4, atol=1e-5)  # sigma takes the factor out
    for variable, value in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert len(others) == len(layer.non_trainable_variables)


class Twice(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return self.layer(x) ** 2 + self.layer(2 * x) ** 3


def test_a_rematerialised_layer():
    """Its call runs again in the backward pass, outside Keras' call, and makes its weight there."""
    x = tf.constant(data(5, 4))
    with keras.RematScope(mode="full"):
        layer = weights.SpectralNormalization(layers.Dense(3, use_bias=False))
        layer.build((None, 4))
    same = dense()
    same.set_weights(layer.get_weights())

    def gradient(of):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(Twice(of)(x))
        return tape.gradient(loss, of.trainable_weights)[0]

    np.testing.assert_allclose(gradient(layer), gradient(same), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tf.function(gradient)(layer), gradient(same), rtol=1e-4, atol=1e-4)


# Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "float64"])
def test_sigma_is_computed_from_the_master_in_float32(policy):
    seen = []

    class Seen(weights.Parametrization):
        def call(self, raw, training=False):
            seen.append(raw)
            return raw

    layer = weights.Parametrized(
        layers.Dense(3, use_bias=False, dtype=policy), {"kernel": [Seen(), weights.SpectralNorm()]}
    )
    layer.build((None, 4))
    y = layer(np.eye(4), training=True)
    assert y.dtype == layer.layer.compute_dtype
    assert {raw.dtype for raw in seen} == {tf.float64 if policy == "float64" else tf.float32}
    np.testing.assert_array_equal(seen[-1], tf.cast(layer.layer.kernel.value, seen[-1].dtype))
    master = np.asarray(layer.layer.kernel.numpy(), "float64")
    np.testing.assert_allclose(np.asarray(y, "float64"), master / np.linalg.norm(master, 2), rtol=2e-2, atol=1e-2)
    assert layer.effective_weights()["kernel"].dtype == layer.layer.kernel.dtype


# Errors ------------------------------------------------------------------------------------------


def test_a_parametrisation_that_changes_the_shape():
    layer = weights.Parametrized(layers.Dense(3), {"kernel": lambda raw: raw[:2]})
    with pytest.raises(ValueError, match=r"Function makes a weight of shape \(2, 3\) from 'kernel'.*\(4, 3\)"):
        layer.build((None, 4))


def test_an_integer_weight():
    class Counting(layers.Layer):
        def build(self, shape):
            self.count = self.add_weight(shape=(2,), dtype="int32", initializer="zeros", name="count")

        def call(self, x):
            return x

    layer = weights.Parametrized(Counting(), {"count": "unit_norm"})
    with pytest.raises(TypeError, match="'count' has dtype int32"):
        layer.build((None, 4))


def test_both_halves_of_a_composition_in_order():
    layer = layers.Dense(3)
    layer.build((None, 4))
    kernel = layer.kernel.numpy()
    for parametrization in (lambda raw: raw + 1.0, lambda raw: raw * 2.0):
        weights.parametrize(layer, "kernel", parametrization)
    np.testing.assert_allclose(weights.effective_weights(layer)["kernel"], 2 * (kernel + 1), rtol=1e-6)
    weights.parametrize(layer, "kernel", weights.WeightNorm())
    np.testing.assert_allclose(weights.effective_weights(layer)["kernel"], 2 * (kernel + 1), rtol=1e-6)
