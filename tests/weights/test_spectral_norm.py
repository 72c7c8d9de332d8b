"""Spectral norm against the singular value decomposition, and its gradient in closed form."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tfloop import weights
from tfloop.step import Step, running
from tfloop.weights import power_iteration as power
from tfloop.weights.matrix import Matrix, matrix_in_equation, matrix_of


def rng(seed=0):
    return np.random.default_rng(seed)


def matrix_with(singular_values, rows, columns, seed=0):
    """A matrix of given singular values."""
    left = np.linalg.qr(rng(seed).standard_normal((rows, len(singular_values))))[0]
    right = np.linalg.qr(rng(seed + 1).standard_normal((columns, len(singular_values))))[0]
    return (left * singular_values @ right.T).astype("float32")


def largest(matrices):
    return np.linalg.svd(np.asarray(matrices, "float64"), compute_uv=False).max()


def built(shape, weight=None, **kwargs):
    """A SpectralNorm for a weight of this shape, warm-started at the weight."""
    norm = weights.SpectralNorm(**kwargs)
    norm.build(shape)
    if weight is not None:
        norm.assign_state(norm.warm_start(weight))
    return norm


# The estimate ------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "float64"]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_sigma_is_the_largest_singular_value(shape, dtype, scale, seed):
    weight = (rng(seed).standard_normal(shape) * scale).astype(dtype)
    matrix = matrix_of(tuple(shape), -1)
    u = power.settled(matrix, weight, power.first_vector(matrix.state_shape, dtype), tolerance=1e-8)
    estimate = power.sigma(matrix, tf.constant(weight), u)
    np.testing.assert_allclose(estimate, largest(weight.reshape(-1, shape[-1])), rtol=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (300, 100), (3, 3, 32, 64)])
def test_a_random_kernel_is_normalised_when_built(shape):
    weight = rng().standard_normal(shape).astype("float32")
    norm = built(shape, weight)
    effective = norm(tf.constant(weight)).numpy()
    np.testing.assert_allclose(largest(effective.reshape(-1, shape[-1])), 1.0, rtol=1e-2)


def test_warm_start_goes_on_until_the_estimate_settles():
    weight = matrix_with(np.linspace(1.0, 0.5, 60), 80, 60)
    matrix, start = matrix_of(weight.shape, -1), power.first_vector((1, 60))
    few = power.sigma(matrix, weight, power.power_iteration(matrix, weight, start, 15))
    many = power.sigma(matrix, weight, power.settled(matrix, weight, start))
    assert few < 0.995
    np.testing.assert_allclose(many, 1.0, rtol=2e-3)


def test_norm_scales():
    weight = rng().standard_normal((5, 4)).astype("float32")
    effective = built((5, 4), weight, norm=3.0)(tf.constant(weight)).numpy()
    np.testing.assert_allclose(largest(effective), 3.0, rtol=1e-3)


def test_a_zero_weight_stays_zero_and_can_leave():
    norm = built((3, 2), np.zeros((3, 2), "float32"))
    raw = tf.Variable(tf.zeros((3, 2)))
    with tf.GradientTape() as tape:
        effective = norm(raw, training=True)
        loss = tf.reduce_sum(effective)
    assert not effective.numpy().any()
    np.testing.assert_array_equal(tape.gradient(loss, raw), np.ones((3, 2)))
    assert np.linalg.norm(norm.u) == pytest.approx(1.0)


def test_tiny_weights_do_not_vanish():
    weight = (rng().standard_normal((4, 3)) * 1e-30).astype("float32")
    np.testing.assert_allclose(largest(built((4, 3), weight)(tf.constant(weight))), 1.0, rtol=1e-2)


def test_within_one_percent_of_the_svd_while_training():
    """A weight with a gap in its spectrum that a gradient moves by a percent a step."""
    weight = matrix_with([4.0, 2.0, 1.0, 0.5], 12, 8)
    norm, raw = built((12, 8), weight), tf.Variable(weight)
    target = rng(9).standard_normal((12, 8)).astype("float32")
    errors = []
    for _ in range(60):
        with tf.GradientTape() as tape:
            effective = norm(raw, training=True)
            loss = tf.reduce_sum((effective - target) ** 2)
        errors.append(abs(largest(effective) - 1))
        gradient = tape.gradient(loss, raw)
        raw.assign_sub(0.04 * gradient / tf.norm(gradient))
    assert max(errors) < 0.01


# The gradient ------------------------------------------------------------------------------------


def gradient_of(norm, weight, cotangent):
    raw = tf.Variable(weight)
    with tf.GradientTape() as tape:
        effective = norm(raw)
    return tape.gradient(effective, raw, output_gradients=tf.constant(cotangent)).numpy()


@pytest.mark.parametrize("c", [1.0, 2.5])
def test_the_gradient_is_the_closed_form(c):
    weight, g = rng(1).standard_normal((2, 5, 4)).astype("float32")
    left, singular, right = np.linalg.svd(weight)
    s, outer = singular[0], np.outer(left[:, 0], right[0])
    expected = c * (g / s - np.sum(g * weight) / s**2 * outer)
    norm = built((5, 4), weight, norm=c)
    norm.assign_state({"u": power.settled(matrix_of((5, 4), -1), weight, norm.u, tolerance=1e-9)})
    np.testing.assert_allclose(gradient_of(norm, weight, g), expected, atol=1e-3)


def test_the_gradient_is_orthogonal_to_the_weight():
    weight, g = rng(2).standard_normal((2, 6, 5)).astype("float32")
    gradient = gradient_of(built((6, 5), weight), weight, g)
    assert abs(np.sum(gradient * weight)) < 1e-5 * np.linalg.norm(gradient) * np.linalg.norm(weight)


def test_a_frozen_sigma_would_have_another_gradient():
    weight, g = rng(2).standard_normal((2, 6, 5)).astype("float32")
    gradient = gradient_of(built((6, 5), weight), weight, g)
    frozen = g / largest(weight)
    cosine = np.sum(gradient * frozen) / np.linalg.norm(gradient) / np.linalg.norm(frozen)
    assert cosine < 0.999


# The matrix of a kernel --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "shape", "expected"),
    [
        ("abc,cde->abde", (4, 2, 3), lambda k: largest(k.reshape(4, 6))),
        ("abcd,cde->abe", (2, 3, 5), lambda k: largest(k.reshape(6, 5))),
        ("ab,cb->ac", (5, 3), lambda k: largest(k)),
        ("abc,bcd->abd", (3, 4, 2), lambda k: max(largest(k[b]) for b in range(3))),
        ("abc,dbe->adec", (4, 3, 2), lambda k: largest(k.transpose(1, 0, 2).reshape(3, 8))),
        ("ab,b->ab", (6,), lambda k: np.abs(k).max()),
    ],
)
def test_the_matrix_of_an_einsum_kernel(equation, shape, expected):
    kernel = rng(5).standard_normal(shape).astype("float32")
    matrix = matrix_in_equation(shape, equation)
    u = power.settled(matrix, kernel, power.first_vector(matrix.state_shape))
    np.testing.assert_allclose(power.sigma(matrix, kernel, u), expected(kernel), rtol=1e-3)


@settings(max_examples=25)
@given(order=st.permutations(range(4)), cuts=st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_a_matrix_gives_its_weight_back(order, cuts):
    first, second = sorted(cuts)
    axes = tuple(order[:first]), tuple(order[first:second]), tuple(order[second:])
    matrix = Matrix((2, 3, 4, 5), *axes)
    weight = np.arange(120.0).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(matrix.back(matrix.of(weight)), weight)
    m, (blocks, rows, columns) = matrix.of(weight).numpy(), matrix.size
    u, v = rng().standard_normal((blocks, columns)), rng(1).standard_normal((blocks, rows))
    np.testing.assert_allclose(np.sum(matrix.forward(weight, u) * v), np.sum(matrix.adjoint(weight, v) * u), rtol=1e-9)
    np.testing.assert_allclose(matrix.forward(weight, u), np.einsum("brc,bc->br", m, u))


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (1, 2)])
def test_output_axis_overrides(axis):
    kernel = rng(6).standard_normal((3, 4, 5)).astype("float32")
    out = [a % 3 for a in ((axis,) if isinstance(axis, int) else axis)]
    rows = [a for a in range(3) if a not in out]
    flat = kernel.transpose(*rows, *out).reshape(int(np.prod([kernel.shape[a] for a in rows])), -1)
    effective = built((3, 4, 5), kernel, output_axis=axis)(tf.constant(kernel))
    np.testing.assert_allclose(largest(flat), (kernel / effective.numpy()).mean(), rtol=1e-3)


def per_channel(kernel):
    h, w, channels, multiplier = kernel.shape
    return kernel.transpose(2, 0, 1, 3).reshape(channels, h * w, multiplier)


KERNELS = {
    "dense": (lambda: layers.Dense(4), (2, 6), {"kernel": lambda k: k}),
    "conv1d": (lambda: layers.Conv1D(4, 3), (2, 6, 3), {"kernel": lambda k: k.reshape(-1, 4)}),
    "conv2d": (lambda: layers.Conv2D(4, 3), (2, 6, 6, 3), {"kernel": lambda k: k.reshape(-1, 4)}),
    "conv3d": (lambda: layers.Conv3D(4, 2), (2, 4, 4, 4, 3), {"kernel": lambda k: k.reshape(-1, 4)}),
    "conv2d_transpose": (
        lambda: layers.Conv2DTranspose(4, 3),
        (2, 5, 5, 3),
        {"kernel": lambda k: k.transpose(0, 1, 3, 2).reshape(-1, 4)},
    ),
    "conv1d_transpose": (
        lambda: layers.Conv1DTranspose(4, 3),
        (2, 5, 3),
        {"kernel": lambda k: k.transpose(0, 2, 1).reshape(-1, 4)},
    ),
    "depthwise": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        (2, 5, 5, 3),
        {"kernel": per_channel},
    ),
    "separable": (
        lambda: layers.SeparableConv2D(5, 3, depth_multiplier=2),
        (2, 5, 5, 3),
        {"depthwise_kernel": per_channel, "pointwise_kernel": lambda k: k.reshape(-1, 5)},
    ),
    "embedding": (lambda: layers.Embedding(7, 3), None, {"embeddings": lambda k: k}),
    "einsum": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3)),
        (2, 5, 4),
        {"kernel": lambda k: k.reshape(4, 6)},
    ),
    "batch_norm": (layers.BatchNormalization, (2, 6), {"gamma": np.diag}),
    "lstm": (
        lambda: layers.LSTM(3),
        (2, 5, 4),
        {"cell/kernel": lambda k: k, "cell/recurrent_kernel": lambda k: k},
    ),
    "gru": (
        lambda: layers.GRU(3),
        (2, 5, 4),
        {"cell/kernel": lambda k: k, "cell/recurrent_kernel": lambda k: k},
    ),
    "simple_rnn_cell": (
        lambda: layers.RNN(layers.SimpleRNNCell(3)),
        (2, 5, 4),
        {"cell/kernel": lambda k: k, "cell/recurrent_kernel": lambda k: k},
    ),
    "bidirectional": (
        lambda: layers.Bidirectional(layers.GRU(3)),
        (2, 5, 4),
        {
            f"{side}_layer/cell/{name}": lambda k: k
            for side in ("forward", "backward")
            for name in ("kernel", "recurrent_kernel")
        },
    ),
}


def randomised(layer):
    for index, variable in enumerate(layer.trainable_weights):
        variable.assign(rng(index).standard_normal(variable.shape))


@pytest.mark.parametrize("kind", KERNELS)
def test_every_kind_of_layer(kind):
    """The weight that is used has norm one as a matrix, and outputs are those of a layer that has it."""
    make, shape, matrices = KERNELS[kind]
    x = np.array([[1, 2, 0]]) if shape is None else rng().standard_normal(shape).astype("float32")
    plain = make()
    plain(x)
    randomised(plain)
    layer = weights.SpectralNormalization(plain)
    output = layer(x, training=False).numpy()
    effective = layer.effective_weights()
    assert set(effective) == set(matrices)
    for path, matrix in matrices.items():
        np.testing.assert_allclose(largest(matrix(effective[path].numpy())), 1.0, rtol=1e-2)
    replaced = {id(layer_variable(plain, path)): value for path, value in effective.items()}
    oracle = make()
    oracle(x)
    for variable, source in zip(oracle.weights, without_state(plain), strict=True):
        variable.assign(replaced.get(id(source), source))
    np.testing.assert_allclose(output, oracle(x, training=False), rtol=1e-5, atol=1e-6)


def layer_variable(layer, path):
    for part in path.split("/"):
        if not hasattr(layer, part):
            return next(v for v in layer.weights if v.name == part)
        layer = getattr(layer, part)
    return layer


def without_state(layer):
    return [v for v in layer.weights if v.name != "u"]


def test_attention_by_its_equations():
    x = rng().standard_normal((2, 4, 6)).astype("float32")
    layer = weights.SpectralNormalization(layers.MultiHeadAttention(2, 3))
    assert layer(x, x, training=True).shape == (2, 4, 6)
    norms = [largest(k.numpy().reshape(6, 6)) for k in layer.effective_weights().values()]
    assert len(norms) == 4
    np.testing.assert_allclose(norms, 1.0, rtol=1e-2)


def test_gamma_is_divided_by_its_largest_entry():
    layer = weights.SpectralNormalization(layers.BatchNormalization())
    layer.build((None, 3))
    layer.layer.gamma.assign([0.5, -4.0, 1.0])
    np.testing.assert_allclose(layer.effective_weights()["gamma"], [0.125, -1.0, 0.25])


# State -------------------------------------------------------------------------------------------


def test_u_moves_once_in_a_step():
    weight = tf.constant(rng().standard_normal((9, 9)), "float32")
    once, twice = built((9, 9)), built((9, 9))
    once(weight, training=True)
    with running(Step()):
        first = twice(weight, training=True)
        second = twice(weight, training=True)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(once.u, twice.u)
    once(weight, training=True)
    assert np.any(once.u.numpy() != twice.u.numpy())


def test_more_iterations_move_u_further():
    weight = tf.constant(rng().standard_normal((30, 30)), "float32")
    one, many = built((30, 30)), built((30, 30), iterations=20)
    estimates = [1 / np.mean(n(weight, training=True) / weight) for n in (one, many)]
    assert estimates[0] < estimates[1] <= largest(weight) * 1.0001


def test_training_may_be_a_tensor():
    weight = tf.constant(rng().standard_normal((9, 9)), "float32")
    norm = built((9, 9))
    before = norm.u.numpy()
    norm(weight, training=tf.constant(False))
    np.testing.assert_array_equal(norm.u, before)
    norm(weight, training=tf.constant(True))
    assert np.any(norm.u.numpy() != before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iterations": 0}, "iterations=0"),
        ({"iterations": 1.5}, "iterations=1.5"),
        ({"norm": 0.0}, "norm=0.0"),
        ({"exact_conv": True, "output_axis": 0}, "output_axis"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        weights.SpectralNorm(**arguments)


def test_an_output_axis_that_does_not_fit():
    with pytest.raises(ValueError, match="output_axis=3 does not fit"):
        weights.SpectralNorm(output_axis=3).build((2, 2))


def test_the_layer_of_the_post_takes_the_arguments():
    layer = weights.SpectralNormalization(layers.Dense(3), iterations=2, norm=0.5)
    layer(np.ones((2, 4), "float32"))
    np.testing.assert_allclose(largest(layer.effective_weights()["kernel"]), 0.5, rtol=1e-2)
    assert (
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer)).get_config()["iterations"]
        == 2
    )
