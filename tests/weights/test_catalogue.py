"""Each parametrisation: its formula, its gradient, what it starts from."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tfloop import weights
from tfloop.weights.orthogonal import cayley, inverse_cayley
from tfloop.weights.parametrization import snake_case


@keras.saving.register_keras_serializable("tests")
def squashed(raw):
    return tf.tanh(raw)


EACH = {
    "spectral_norm": lambda: weights.SpectralNorm(norm=2.0),
    "weight_norm": weights.WeightNorm,
    "weight_norm of all": lambda: weights.WeightNorm(output_axis=None),
    "unit_norm": weights.UnitNorm,
    "unit_norm of rows": lambda: weights.UnitNorm(axis=(1,)),
    "max_norm": lambda: weights.MaxNorm(0.9),
    "centered": weights.Centered,
    "orthogonal": weights.Orthogonal,
    "bounded": lambda: weights.Bounded(-1.5, 2.0),
    "non_negative": weights.NonNegative,
    "function": lambda: weights.Function(squashed),
}


def rng(seed=0):
    return np.random.default_rng(seed)


def built(parametrization, shape, dtype="float64"):
    parametrization.dtype_policy = dtype
    parametrization.build(shape)
    return parametrization


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("shape", [(4, 3), (2, 5)])
def test_the_gradient_is_that_of_finite_differences(kind, shape):
    """In float64; a spectral norm with u at rest, where holding u constant changes nothing."""
    parametrization = built(EACH[kind](), shape)
    raw, g = rng(1).standard_normal((2, *shape))
    if kind == "spectral_norm":
        for _ in range(200):
            parametrization(tf.constant(raw), training=True)
    variable = tf.Variable(raw)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(g * parametrization(variable))
    step = 1e-5
    numeric = np.zeros(shape)
    for index in np.ndindex(shape):
        change = np.zeros(shape)
        change[index] = step
        up, down = parametrization(tf.constant(raw + change)), parametrization(tf.constant(raw - change))
        numeric[index] = np.sum(g * (up - down)) / (2 * step)
    np.testing.assert_allclose(tape.gradient(loss, variable), numeric, rtol=1e-4, atol=1e-6)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(EACH)),
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    dtype=st.sampled_from(["float32", "float64"]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
)
def test_shape_and_dtype_stay_and_all_is_finite(kind, shape, dtype, scale):
    parametrization = built(EACH[kind](), tuple(shape), dtype)
    raw = tf.Variable(rng().standard_normal(shape) * scale, dtype=dtype)
    with tf.GradientTape() as tape:
        effective = parametrization(raw, training=True)
    gradient = tape.gradient(effective, raw)
    assert effective.shape == raw.shape and effective.dtype == raw.dtype
    assert np.isfinite(effective).all() and np.isfinite(gradient).all()


def effective_of(parametrization, weight):
    """What a Dense layer with this kernel uses once it is parametrised."""
    layer = layers.Dense(weight.shape[1])
    layer.build((None, weight.shape[0]))
    layer.kernel.assign(weight)
    return weights.Parametrized(layer, {"kernel": parametrization}).effective_weights()["kernel"].numpy()


def test_formulas():
    w = rng().standard_normal((5, 3)).astype("float32")
    length = np.linalg.norm(w, axis=0)
    near = lambda p, expected: np.testing.assert_allclose(effective_of(p, w), expected, rtol=1e-5, atol=1e-6)
    near(weights.UnitNorm(), w / length)
    near(weights.UnitNorm(axis=1), w / np.linalg.norm(w, axis=1, keepdims=True))
    near(weights.UnitNorm(axis=None), w / np.linalg.norm(w))
    near(weights.MaxNorm(1.5), w * np.minimum(1, 1.5 / length))
    near(weights.Centered(), w - w.mean(0))
    near(weights.Centered(axis=None), w - w.mean())
    near([weights.Centered(), weights.UnitNorm()], (w - w.mean(0)) / np.linalg.norm(w - w.mean(0), axis=0))
    near(keras.ops.square, w**2)
    near("unit_norm", w / length)


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "weight_norm of all", "unit_norm", "max_norm"])
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e20, 1e30])
def test_weights_whose_squares_are_no_float32(kind, scale):
    """What does not depend on the scale is that of the weights without it, and the gradient that by the scale."""
    w, g = rng().standard_normal((2, 5, 3)) * 3
    found = {}
    for factor in (1.0, scale):
        parametrization = built(EACH[kind](), w.shape, "float32")
        raw = (w * factor).astype("float32")
        parametrization.assign_state(parametrization.warm_start(raw))
        variable = tf.Variable(raw)
        with tf.GradientTape() as tape:
            effective = parametrization(variable)
            loss = tf.reduce_sum(g * effective)
        found[factor] = effective.numpy(), tape.gradient(loss, variable).numpy() * factor
    if kind == "max_norm" and scale < 1:
        found[1.0] = w * scale, g * scale
    for got, expected in zip(found[scale], found[1.0], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    if kind.startswith("weight_norm"):
        start = built(EACH[kind](), w.shape, "float32").start((w * scale).astype("float32"))[1]["g"]
        axis = None if kind.endswith("all") else 0
        np.testing.assert_allclose(start, np.linalg.norm(w, axis=axis) * scale, rtol=1e-5)


def test_weight_norm_trains_length_and_direction():
    layer = weights.Parametrized(layers.Dense(3), {"kernel": weights.WeightNorm()})
    layer.build((None, 5))
    (g,) = [v for v in layer.trainable_weights if v.name == "g"]
    g.assign([1.0, 2.0, 3.0])
    effective = layer.effective_weights()["kernel"].numpy()
    np.testing.assert_allclose(np.linalg.norm(effective, axis=0), [1, 2, 3], rtol=1e-6)
    raw = layer.layer.kernel.numpy()
    np.testing.assert_allclose(effective, raw / np.linalg.norm(raw, axis=0) * [1, 2, 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("parametrization", "weight"),
    [
        (weights.WeightNorm(), rng().standard_normal((5, 3))),
        (weights.WeightNorm(output_axis=0), rng().standard_normal((5, 3))),
        (weights.Bounded(-1.0, 2.0), rng().uniform(-0.999, 1.999, (5, 3))),
        (weights.NonNegative(), rng().uniform(1e-4, 30.0, (5, 3))),
        (weights.Orthogonal(), np.linalg.qr(rng().standard_normal((5, 3)))[0]),
        (weights.Orthogonal(), -np.eye(4)),
        ([weights.WeightNorm(), weights.Bounded(-5.0, 5.0)], rng().standard_normal((5, 3))),
        ([weights.NonNegative(), weights.WeightNorm()], rng().uniform(0.1, 1.0, (5, 3))),
    ],
)
def test_a_right_inverse_keeps_the_weight(parametrization, weight):
    weight = weight.astype("float32")
    np.testing.assert_allclose(effective_of(parametrization, weight), weight, rtol=1e-4, atol=2e-6)


def test_a_weight_out_of_range_starts_inside():
    bounded = effective_of(weights.Bounded(0.0, 1.0), np.array([[-3.0, 0.5], [1.0, 7.0]], "float32"))
    np.testing.assert_allclose(bounded, [[0.01, 0.5], [0.99, 0.99]], rtol=1e-4)
    positive = effective_of(weights.NonNegative(), np.array([[-3.0, 0.5], [0.0, 7.0]], "float32"))
    np.testing.assert_allclose(positive, [[0.01, 0.5], [0.01, 7.0]], rtol=1e-4)


@settings(max_examples=25)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), scale=st.sampled_from([0.0, 1e-2, 1.0, 10.0, 100.0]))
def test_orthogonal_is_exact_for_every_raw_weight(rows, columns, scale):
    parametrization = built(weights.Orthogonal(), (rows, columns), "float32")
    w = parametrization(tf.constant(rng(rows).standard_normal((rows, columns)) * scale, "float32")).numpy()
    gram = w.T @ w if rows >= columns else w @ w.T
    np.testing.assert_allclose(gram, np.eye(min(rows, columns)), atol=1e-5)


@settings(max_examples=25)
@given(n=st.integers(1, 12), extra=st.integers(0, 5), seed=st.integers(0, 99))
def test_cayley_reaches_every_matrix(n, extra, seed):
    q = np.linalg.qr(rng(seed).standard_normal((n + extra, n)))[0]
    signs, raw = inverse_cayley(q)
    np.testing.assert_allclose(cayley(tf.constant(raw)) * signs, q, atol=1e-9)


def test_orthogonal_starts_from_the_nearest():
    weight = rng().standard_normal((6, 4)).astype("float32")
    left, _, right = np.linalg.svd(weight, full_matrices=False)
    np.testing.assert_allclose(effective_of(weights.Orthogonal(), weight), left @ right, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape", "matrices"),
    [
        (lambda: layers.Conv2D(4, 3), (2, 6, 6, 3), lambda k: k.reshape(1, 27, 4)),
        (lambda: layers.Conv2DTranspose(4, 3), (2, 6, 6, 3), lambda k: k.transpose(0, 1, 3, 2).reshape(1, 27, 4)),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (2, 6, 6, 3), None),
    ],
)
def test_orthogonal_kernels_of_convolutions(make, shape, matrices):
    layer = weights.Parametrized(make(), {"kernel": "orthogonal"})
    layer.build(shape)
    kernel = layer.effective_weights()["kernel"].numpy()
    blocks = kernel.transpose(2, 0, 1, 3).reshape(3, 9, 2) if matrices is None else matrices(kernel)
    for block in blocks:
        np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)


def test_orthogonal_stays_so_in_training():
    layer = weights.Parametrized(layers.Dense(4, use_bias=False), {"kernel": "orthogonal"})
    model = keras.Sequential([keras.Input((6,)), layer])
    x, y = rng().standard_normal((32, 6)), 5 * rng(1).standard_normal((32, 4))
    model.compile(keras.optimizers.Adam(0.1), "mse")
    losses = model.fit(x, y, epochs=20, verbose=0).history["loss"]
    w = layer.effective_weights()["kernel"].numpy()
    np.testing.assert_allclose(w.T @ w, np.eye(4), atol=1e-5)
    assert losses[-1] < losses[0]


# Names, functions, subclasses --------------------------------------------------------------------


def test_names():
    assert isinstance(weights.get("spectral_norm"), weights.SpectralNorm)
    assert snake_case("NonNegative") == "non_negative"
    with pytest.raises(ValueError, match=r"'spectral'.*'spectral_norm', 'weight_norm'"):
        weights.get("spectral")
    with pytest.raises(ValueError, match=r"'max_norm' needs arguments.*MaxNorm\(\.\.\.\)"):
        weights.get("max_norm")
    with pytest.raises(TypeError, match=r"write UnitNorm\(\)"):
        weights.get(weights.UnitNorm)
    with pytest.raises(TypeError, match="not 3"):
        weights.get(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weights.MaxNorm(0.0), "limit=0.0"),
        (lambda: weights.Bounded(1.0, 1.0), "low must be less"),
        (lambda: weights.UnitNorm(axis=2).build((3, 3)), "axis=2 does not fit"),
        (lambda: weights.Centered(axis=(0, -3)).build((3, 3)), "does not fit"),
        (lambda: weights.WeightNorm(output_axis=4).build((3, 3)), "axis=4 does not fit"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", EACH)
def test_each_is_restored_from_its_config(kind):
    parametrization = EACH[kind]()
    config = keras.saving.serialize_keras_object(parametrization)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(parametrization)
    assert again.get_config() == parametrization.get_config()
    assert config["registered_name"].startswith("tfloop>")


def test_a_function_that_no_file_can_hold_says_so():
    with pytest.raises(ValueError, match="register_keras_serializable"):
        weights.Function(lambda raw: raw).get_config()
    with pytest.raises(TypeError, match="a function of one tensor"):
        weights.Function(3)


@keras.saving.register_keras_serializable("tests")
def halved(raw):
    return raw / 2


def test_a_registered_function_is_restored():
    function = weights.Function(halved)
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(function)).fn is halved


def test_a_parametrisation_of_ones_own():
    @keras.saving.register_keras_serializable("tests")
    class Counted(weights.Parametrization):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def build(self, shape):
            self.add_state("calls", (), "zeros")

        def call(self, raw, training=False):
            if training:
                self.once_a_step(lambda: self.calls.assign_add(1.0))
            return raw * self.factor

        def start(self, weight):
            return weight / self.factor, {}

        def get_config(self):
            return {"factor": self.factor}

    layer = weights.Parametrized(layers.Dense(2), {"kernel": Counted(4.0)})
    plain = layers.Dense(2)
    plain.build((None, 3))
    layer.layer.build((None, 3))
    layer.layer.set_weights(plain.get_weights())
    x = np.ones((1, 3), "float32")
    for _ in range(3):
        np.testing.assert_allclose(layer(x, training=True), plain(x), rtol=1e-6)
    assert next(v for v in layer.weights if v.name == "calls").numpy() == 3


@keras.saving.register_keras_serializable("tests")
class Scaled(weights.Parametrization):
    """Says nothing of its arguments, nor does the next."""

    def __init__(self, factor=1.0, shift=0.0):
        super().__init__()
        self.factor, self.shift = factor, shift

    def call(self, raw):
        return raw * self.factor + self.shift


@keras.saving.register_keras_serializable("tests")
class ScaledNorm(weights.UnitNorm):
    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, raw, training=False):
        return super().call(raw) * self.factor


@pytest.mark.parametrize(
    ("made", "oracle"),
    [
        (lambda: Scaled(3.0, shift=2.0), lambda raw: raw * 3 + 2),
        (lambda: ScaledNorm(3.0, axis=1), lambda raw: 3 * raw / np.linalg.norm(raw, axis=1, keepdims=True)),
    ],
)
def test_arguments_are_kept_without_a_get_config(made, oracle, tmp_path):
    model = keras.Sequential([keras.Input((4,)), weights.Parametrized(layers.Dense(2), {"kernel": made()})])
    model.save(tmp_path / "model.keras")
    for each in (model, keras.saving.load_model(tmp_path / "model.keras")):
        (layer,) = each.layers
        expected = oracle(layer.layer.kernel.numpy())
        np.testing.assert_allclose(layer.effective_weights()["kernel"], expected, rtol=1e-5)


def test_arguments_that_cannot_be_copied_or_kept_say_so():
    class Positional(weights.Parametrization):
        def __init__(self, *factors):
            super().__init__()

    assert Scaled(np.ones(2)).fresh().factor.shape == (2,)
    with pytest.raises(ValueError, match=r"Scaled was made with .* define get_config"):
        Scaled(np.ones(2)).get_config()
    with pytest.raises(TypeError, match=r"Scaled was made with a layer or a variable.* define get_config"):
        Scaled(keras.Variable(1.0)).fresh()
    with pytest.raises(ValueError, match=r"Positional.__init__ has arguments without a name"):
        Positional(1.0).get_config()
