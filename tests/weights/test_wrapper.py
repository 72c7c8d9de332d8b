"""Wrapped layers: arguments, places, names, errors."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfloop import names, weights


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def same(raw):
    return raw * 1.0


def test_the_form_of_the_post():
    x = keras.Input((8,))
    y = weights.SpectralNormalization(layers.Dense(100, activation="relu"))(x)
    model = keras.Model(x, y)
    assert model.output_shape == (None, 100)
    assert [v.path for v in model.trainable_weights] and len(model.trainable_weights) == 2


def test_a_built_layer_keeps_its_weights():
    plain = layers.Dense(3)
    plain.build((None, 4))
    before = plain.get_weights()
    layer = weights.Parametrized(plain, {"kernel": weights.UnitNorm()})
    layer(data(2, 4))
    for new, old in zip(plain.get_weights(), before, strict=True):
        np.testing.assert_array_equal(new, old)
    assert set(layer.effective_weights()) == {"kernel"}  # at once, before it is called


def test_states_have_names():
    layer = weights.Parametrized(
        layers.LSTM(3), {"kernel": weights.SpectralNorm(), "recurrent_kernel": ["weight_norm", "weight_norm"]}
    )
    layer.build((None, 5, 2))
    assert list(names.weight_names(layer)) == [
        "layer/cell/kernel",
        "layer/cell/recurrent_kernel",
        "layer/cell/bias",
        "cell_kernel_spectral_norm/u",
        "cell_recurrent_kernel_weight_norm/g",
        "cell_recurrent_kernel_weight_norm_1/g",
    ]
    assert len(layer.layer.weights) == 3  # what is wrapped stays as it was
    assert len(layer.trainable_weights) == 5
    layer.trainable = False
    assert layer.trainable_weights == []


def test_call_arguments_pass_through():
    x, mask = data(2, 5, 4), np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    state = [data(2, 3), data(2, 3)]
    plain = layers.LSTM(3, return_state=True, dropout=0.5)
    layer = weights.Parametrized(plain, {"*kernel": same})
    outputs = layer(x, mask=mask, initial_state=state, training=False)
    for a, b in zip(outputs, plain(x, mask=mask, initial_state=state, training=False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    without = layer(x, training=False)
    assert np.any(without[0] != outputs[0])
    assert np.any(layer(x, training=True)[0] != without[0])


def test_masks_pass_through():
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            weights.SpectralNormalization(layers.Embedding(6, 3, mask_zero=True)),
            weights.SpectralNormalization(layers.LSTM(2)),
        ]
    )
    long, short = model(np.array([[1, 2, 0, 0], [1, 2, 3, 4]])).numpy(), model(np.array([[1, 2, 0, 0]])).numpy()
    np.testing.assert_allclose(long[0], short[0], rtol=1e-5)
    plain = weights.bake(model)
    np.testing.assert_allclose(plain(np.array([[1, 2, 0, 0]])), short, rtol=1e-5)


def test_attention_takes_its_several_inputs():
    layer = weights.Parametrized(layers.MultiHeadAttention(2, 3), {"kernel": "spectral_norm"})
    query, value = data(2, 4, 6), data(2, 5, 6)
    output, scores = layer(query, value, return_attention_scores=True, training=True)
    assert output.shape == (2, 4, 6) and scores.shape == (2, 2, 4, 5)
    assert len(layer.effective_weights()) == 4
    q, v = keras.Input((4, 6)), keras.Input((5, 6))
    fresh = weights.SpectralNormalization(layers.MultiHeadAttention(2, 3))
    assert keras.Model([q, v], fresh(q, v)).output_shape == (None, 4, 6)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["graph", "xla"])
@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: layers.Bidirectional(weights.SpectralNormalization(layers.LSTM(3))), (2, 5, 4), (2, 6)),
        (lambda: weights.SpectralNormalization(layers.Bidirectional(layers.LSTM(3))), (2, 5, 4), (2, 6)),
        (lambda: layers.TimeDistributed(weights.SpectralNormalization(layers.Dense(3))), (2, 5, 4), (2, 5, 3)),
        (lambda: layers.RNN(weights.SpectralNormalization(layers.GRUCell(3))), (2, 5, 4), (2, 3)),
        (
            lambda: layers.RNN(
                [weights.SpectralNormalization(layers.GRUCell(3)), layers.SimpleRNNCell(2)],
                return_sequences=True,
            ),
            (2, 5, 4),
            (2, 5, 2),
        ),
        (lambda: weights.SpectralNormalization(layers.ConvLSTM1D(2, 3)), (2, 3, 6, 2), (2, 4, 2)),
        (lambda: weights.SpectralNormalization(keras.Sequential([layers.Dense(3), layers.Dense(2)])), (2, 4), (2, 2)),
        (
            lambda: weights.SpectralNormalization(weights.Parametrized(layers.Dense(3), {"kernel": "centered"})),
            (2, 4),
            (2, 3),
        ),
    ],
)
def test_places(make, shape, expected, compiled):
    model = keras.Sequential([keras.Input(shape[1:]), make()])
    x = data(*shape)
    assert model(x).shape == expected
    model.compile("sgd", "mse", jit_compile=compiled)
    model.fit(x, data(*expected), verbose=0)
    assert weights.effective_weights(model)
    np.testing.assert_allclose(weights.bake(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_one_side_of_bidirectional():
    layer = weights.Parametrized(
        layers.Bidirectional(layers.LSTM(3)), {"forward_layer/*/kernel": weights.SpectralNorm()}
    )
    layer.build((None, 5, 4))
    assert list(layer.effective_weights()) == ["forward_layer/cell/kernel"]


def test_a_users_own_layer_with_and_without_build():
    class Own(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

        def call(self, x):
            return x * self.scale

    class Lazy(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inside = [layers.Dense(3), Own()]

        def call(self, x):
            for layer in self.inside:
                x = layer(x)
            return x

    layer = weights.Parametrized(Lazy(), {"inside/1/scale": lambda raw: 3.0 * raw, "kernel": "unit_norm"})
    y = layer(data(2, 4)).numpy()
    kernel = layer.layer.inside[0].kernel.numpy()
    np.testing.assert_allclose(y, 3 * data(2, 4) @ (kernel / np.linalg.norm(kernel, axis=0)), rtol=1e-5)


def test_a_layer_first_called_inside_a_function():
    layer = weights.Parametrized(layers.Dense(3), {"kernel": weights.Bounded(-9.0, 9.0), "bias": "weight_norm"})
    x = data(2, 4)
    y = tf.function(layer)(x)
    np.testing.assert_allclose(layer(x), y, rtol=1e-5)
    assert np.abs(layer.effective_weights()["kernel"]).max() < 2.0  # what Glorot gave


def test_a_layer_built_while_keras_learns_shapes():
    """In a model without `build`, Keras makes variables first and gives them values later."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = weights.SpectralNormalization(layers.Dense(64))
            self.second = weights.Parametrized(layers.Dense(64), {"kernel": weights.Bounded(-9.0, 9.0)})

        def call(self, x):
            return self.second(self.first(x))

    model = Model()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(data(4, 32), data(4, 64), verbose=0)
    first, second = weights.effective_weights(model).values()
    np.testing.assert_allclose(np.linalg.norm(first, 2), 1.0, rtol=1e-2)
    assert np.abs(second).max() < 0.25  # what Glorot gave


def test_the_policy_and_dtype_are_the_layers():
    layer = weights.SpectralNormalization(layers.Dense(3, dtype="mixed_bfloat16"))
    assert layer.compute_dtype == "bfloat16"
    assert layer(data(2, 4)).dtype == "bfloat16"


def test_trains_with_a_users_own_train_step_and_keras_fit():
    class Gan(keras.Model):
        def __init__(self):
            super().__init__()
            self.d = keras.Sequential([weights.SpectralNormalization(layers.Dense(8)), layers.Dense(1)])
            self.d.build((None, 4))
            self.optimizer_of_d = keras.optimizers.Adam(0.001)

        def train_step(self, x):
            with tf.GradientTape() as tape:
                loss = ops.mean(self.d(x, training=True)) - ops.mean(self.d(x + 1.0, training=True))
            self.optimizer_of_d.apply(tape.gradient(loss, self.d.trainable_weights), self.d.trainable_weights)
            return {"loss": loss}

    model = Gan()
    model.compile(jit_compile=True)
    model.fit(data(64, 4), batch_size=8, epochs=2, verbose=0)
    (w,) = weights.effective_weights(model).values()
    np.testing.assert_allclose(np.linalg.norm(w, 2), 1.0, rtol=3e-2)


# Errors ------------------------------------------------------------------------------------------


def test_a_name_that_is_no_weight():
    layer = weights.Parametrized(layers.Dense(3), {"kernal": weights.SpectralNorm()})
    with pytest.raises(ValueError, match=r"'kernal' is not a weight of 'dense.*' \(Dense\).*'kernel', 'bias'"):
        layer(data(2, 4))


def test_a_layer_without_weights():
    with pytest.raises(ValueError, match=r"\(ReLU\) has no weights"):
        weights.SpectralNormalization(layers.ReLU())(data(2, 4))


def test_a_layer_without_a_kernel():
    class Own(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(4, 4), name="w")

        def call(self, x):
            return x @ self.w

    with pytest.raises(ValueError, match=r"only 'w'.*Parametrized\(layer, \{name: SpectralNorm\(\)\}\)"):
        weights.SpectralNormalization(Own())(data(2, 4))


def test_zero_iterations():
    with pytest.raises(ValueError, match="iterations=0"):
        weights.SpectralNormalization(layers.Dense(3), iterations=0)


@pytest.mark.parametrize("given", [{"kernel": []}, {}])
def test_nothing_to_do(given):
    with pytest.raises(ValueError, match="parametrisation"):
        weights.Parametrized(layers.Dense(3), given)


def test_something_that_is_no_layer():
    with pytest.raises(ValueError, match="layer"):
        weights.Parametrized("dense", {"kernel": "unit_norm"})
