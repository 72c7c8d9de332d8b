"""NumPy code in a loss: values and gradients against the analytic ones."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

from tfloop import finite_differences
from tfloop.model import Model
from tfloop.numpy_loss import numpy_loss
from tfloop.step import Step, running

RNG = np.random.default_rng(0)
Y = RNG.integers(0, 3, size=6)
P = keras.activations.softmax(tf.constant(RNG.normal(size=(6, 3)), "float32")).numpy()


def crossentropy(y, p):
    return -np.log(p[np.arange(len(y)), y])


def crossentropy_gradient(y, p):
    gradient = np.zeros_like(p)
    gradient[np.arange(len(y)), y] = -1 / p[np.arange(len(y)), y]
    return None, gradient


def mean_crossentropy(y, p):
    return crossentropy(y, p).mean()


def mean_crossentropy_gradient(y, p):
    return None, crossentropy_gradient(y, p)[1] / len(y)


def crossentropy_in_graph(y, p):
    return -tf.math.log(tf.gather(p, y, batch_dims=1))


def value_and_gradient(loss, y, p, weights=None, mode="eager"):
    y, p = tf.constant(y), tf.constant(p)

    def run(y, p):
        with tf.GradientTape() as tape:
            tape.watch(p)
            value = loss(y, p)
            total = tf.reduce_sum(value if weights is None else value * weights)
        return value, tape.gradient(total, p)

    return (tf.function(run) if mode == "graph" else run)(y, p)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("given_gradient", [False, True])
def test_one_value_an_example_and_its_weighted_gradient(mode, given_gradient):
    loss = numpy_loss(crossentropy, crossentropy_gradient if given_gradient else None)
    weights = tf.constant(RNG.uniform(size=6), "float32")
    value, gradient = value_and_gradient(loss, Y, P, weights, mode)
    expected, expected_gradient = value_and_gradient(crossentropy_in_graph, Y, P, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("given_gradient", [False, True])
def test_scalar_and_its_gradient(mode, given_gradient):
    loss = numpy_loss(mean_crossentropy, mean_crossentropy_gradient if given_gradient else None)
    value, gradient = value_and_gradient(loss, Y, P, 3.0, mode)
    _, expected = value_and_gradient(lambda y, p: 3.0 * ops.mean(crossentropy_in_graph(y, p)), Y, P)
    assert value.shape == ()
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_examples_that_depend_on_each_other_have_the_whole_gradient():
    def relative(x):
        return x[:, 0] / x.sum()

    def relative_in_graph(x):
        return x[:, 0] / tf.reduce_sum(x)

    x, weights = tf.constant(P), tf.constant(RNG.uniform(size=6), "float32")
    gradients = []
    for loss in (numpy_loss(relative), relative_in_graph):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(loss(x) * weights)
        gradients.append(tape.gradient(total, x))
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-6)


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    st.sampled_from([np.sin, np.tanh, np.exp, lambda x: x**3, lambda x: 100.0 + x]),
)
@settings(max_examples=30)
def test_differences_are_close_to_the_derivative(x, fn):
    x = np.array(x)
    derivative = {np.sin: np.cos, np.tanh: lambda x: 1 / np.cosh(x) ** 2, np.exp: np.exp}.get(fn)
    derivative = derivative or (lambda x: 3 * x**2 if fn(2.0) == 8 else np.ones_like(x))
    for upstream in (np.ones(()), np.linspace(1, 2, len(x))):
        total = (lambda x: fn(x).sum()) if upstream.shape == () else fn
        result = finite_differences.gradient(total, [x], 0, upstream)
        np.testing.assert_allclose(result, upstream * derivative(x), rtol=1e-6, atol=1e-4)


def test_function_that_computes_in_float32_gets_a_coarser_step():
    result = finite_differences.gradient(
        lambda x: np.sum(np.sin(x.astype("float32")) + 1.0), [np.array([0.3, 1.0])], 0, 1.0
    )
    np.testing.assert_allclose(result, np.cos([0.3, 1.0]), rtol=1e-3)


def test_probabilities_near_zero_stay_positive():
    p = np.array([[1e-7, 1 - 1e-7]], "float32")
    _, gradient = value_and_gradient(numpy_loss(crossentropy), np.array([0]), p)
    np.testing.assert_allclose(gradient[0, 0], -1e7, rtol=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype):
    seen = []

    def square(x):
        seen.append(x.dtype)
        return np.sum(x**2)

    x = tf.constant([0.5, 2.0], dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = numpy_loss(square)(x)
    gradient = tape.gradient(value, x)
    wide = "float64" if dtype == "float64" else "float32"
    assert seen[0] == wide and value.dtype == wide and gradient.dtype == dtype
    np.testing.assert_allclose(tf.cast(gradient, "float64"), [1.0, 4.0], rtol=1e-4)


def network(**compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax")])
    model.compile(optimizer=keras.optimizers.SGD(0.5), jit_compile=False, **compiled)
    return model


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("code", [crossentropy, mean_crossentropy])
def test_compiled_loss_and_metric_train_as_keras_own(code, run_eagerly):
    def as_labels(y, p):  # Keras hands labels to a loss as floats
        return code(y.astype(int), p)

    x, y = RNG.normal(size=(20, 4)), RNG.integers(0, 3, size=20)
    own = network(loss="sparse_categorical_crossentropy")
    ours = network(loss=numpy_loss(as_labels), metrics=[numpy_loss(as_labels)], run_eagerly=run_eagerly)
    history = [m.fit(x, y, batch_size=8, epochs=3, verbose=0).history for m in (own, ours)]
    if code is crossentropy:  # the mean of a scalar over batches is not weighted in Keras' metrics
        np.testing.assert_allclose(history[1]["loss"], history[0]["loss"], rtol=1e-4)
        np.testing.assert_allclose(history[1]["as_labels"], history[0]["loss"], rtol=1e-4)
    for a, b in zip(own.weights, ours.weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_metric_is_named_after_the_function():
    assert numpy_loss(mean_crossentropy).__name__ == "mean_crossentropy"


def test_symbolic_tensors_of_a_functional_model():
    y, x = keras.Input((), dtype="int32"), keras.Input((3,))
    loss, scalar = numpy_loss(crossentropy)(y, x), numpy_loss(mean_crossentropy)(y, x)
    assert loss.shape == (None,) and scalar.shape == ()
    model = keras.Model([y, x], [loss, scalar])
    value, mean = model([Y, P])
    np.testing.assert_allclose(value, crossentropy(Y, P), rtol=1e-6)
    np.testing.assert_allclose(mean, crossentropy(Y, P).mean(), rtol=1e-6)


def test_labels_without_gradient_are_not_differentiated():
    calls = []

    def counted(y, p):
        calls.append(1)
        return crossentropy(y.astype(int), p)

    value_and_gradient(numpy_loss(counted, per_example=True), Y.astype("float32"), P, mode="graph")
    calls.clear()
    value_and_gradient(numpy_loss(counted, per_example=True), Y.astype("float32"), P, mode="graph")
    # The value, two to choose the step and the way, one more to compare, and 2 for each column.
    assert len(calls) <= 4 + 2 * 3


@pytest.mark.parametrize(
    "code, message",
    [
        (lambda y, p: p, r"gave shape \(6, 3\).*Expected a scalar or one value an example, \(6,\)"),
        (lambda y, p: p[:4, 0], r"gave shape \(4,\)"),
        (lambda y, p: "text", "no number"),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_wrong_values_are_refused(code, message, mode):
    with pytest.raises((ValueError, TypeError), match=message):
        value_and_gradient(numpy_loss(code), Y, P, mode=mode)


@pytest.mark.parametrize(
    "gradient, message",
    [
        (lambda y, p: [p], "gave 1 arrays for 2 inputs"),
        (lambda y, p: [None, p.T], r"gave shape \(3, 6\) for input 1, which has shape \(6, 3\)"),
    ],
)
def test_wrong_gradients_are_refused(gradient, message):
    with pytest.raises(ValueError, match=message):
        value_and_gradient(numpy_loss(crossentropy, gradient), Y, P)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        value_and_gradient(numpy_loss(crossentropy, gradient), Y, P, mode="graph")


def test_given_gradient_of_an_input_without_rows_is_refused():
    loss = numpy_loss(lambda x, w: x @ w, lambda x, w: (np.ones_like(x) * w, x.sum(0)))
    with tf.GradientTape() as tape:
        x, w = tf.ones((4, 2)), tf.ones(2)
        tape.watch(w)
        value = loss(x, w)
    with pytest.raises(ValueError, match="no row for each"):
        tape.gradient(value, w)


def test_function_that_fails_on_made_up_arrays_is_taken_for_a_scalar():
    def picky(y, p):
        if 0.1 in p.astype("float32"):
            raise ValueError("not these")
        return crossentropy(y, p)

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"numpy_loss\(fn, per_example=True\)"):
        value_and_gradient(numpy_loss(picky), Y, P, mode="graph")
    value, _ = value_and_gradient(numpy_loss(picky, per_example=True), Y, P, mode="graph")
    np.testing.assert_allclose(value, crossentropy(Y, P), rtol=1e-6)


def test_arrays_are_read_only():
    def writes(x):
        x[0] = 0.0
        return x.sum()

    with pytest.raises(ValueError, match="read-only"):
        numpy_loss(writes)(tf.ones(3))


def test_step_is_told_what_xla_cannot_compile():
    with running(Step()) as step:
        for _ in range(2):
            numpy_loss(crossentropy)(tf.constant(Y), tf.constant(P))
    assert step.uncompilable == ["numpy_loss 'crossentropy'"]


def test_many_calls_are_warned_of_once(caplog):
    loss = numpy_loss(lambda x: np.sum(x**2))
    for _ in range(2):
        with tf.GradientTape() as tape:
            x = tf.ones((30, 20))
            tape.watch(x)
            value = loss(x)
        tape.gradient(value, x)
    assert caplog.text.count("1200 times a step") == 1


@pytest.mark.parametrize("arguments", [(1,), (crossentropy, 2)])
def test_what_is_no_function_is_refused(arguments):
    with pytest.raises(TypeError, match="is no function"):
        numpy_loss(*arguments)


def in_the_loop(**compiled):
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    model = Model(x, layers.Dense(3, activation="softmax", name="p")(x))
    model.compile(keras.optimizers.SGD(0.5), **compiled)
    return model


def labelled(y, p):
    return crossentropy(y.astype(int), p)


@pytest.mark.parametrize("way", ["compiled", "registered"])
def test_in_the_loop_it_trains_as_keras_own(way):
    x, y = RNG.normal(size=(20, 4)).astype("float32"), RNG.integers(0, 3, size=20)
    own = in_the_loop(loss="sparse_categorical_crossentropy")
    if way == "compiled":
        ours = in_the_loop(loss=numpy_loss(labelled), metrics=[numpy_loss(labelled)])
    else:
        ours = in_the_loop()
        ours.add_loss(lambda t: numpy_loss(labelled)(t["y"], t["p"]))
        ours.add_metric(lambda t: numpy_loss(labelled)(t["y"], t["p"]), name="labelled")
    history = [m.fit(x, y, batch_size=8, epochs=3, verbose=0).history for m in (own, ours)]
    for name in ("loss", "labelled"):
        np.testing.assert_allclose(history[1][name], history[0]["loss"], rtol=1e-4)
    for a, b in zip(own.weights, ours.weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_in_the_loop_xla_is_refused_when_asked_for():
    model = in_the_loop(loss=numpy_loss(labelled), jit_compile=True)
    with pytest.raises(ValueError, match="numpy_loss 'labelled'"):
        model.fit(np.ones((8, 4)), np.zeros(8), verbose=0)
