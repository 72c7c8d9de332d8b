"""BatchNorm statistics against NumPy over the whole data."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfloop.batch_norm import reestimate_batch_norm as reestimate

RNG = np.random.default_rng(0)
X = RNG.normal(5.0, 2.0, size=(100, 3)).astype("float32")


def dataset(x, batch=7):
    return tf.data.Dataset.from_tensor_slices(x).batch(batch)


def two_norms(**options):
    return keras.Sequential(
        [
            keras.Input((3,)),
            layers.BatchNormalization(name="first", **options),
            layers.Dense(4, activation="tanh", name="dense"),
            layers.BatchNormalization(name="second", **options),
        ]
    )


def by_hand(model, x, batch=7):
    """Both layers' inputs, with batch statistics, in float64."""
    first, dense = model.get_layer("first"), model.get_layer("dense")
    gamma, beta, kernel, bias = (np.array(w, "float64") for w in (first.gamma, first.beta, dense.kernel, dense.bias))
    x = x.astype("float64")
    parts = [x[i : i + batch] for i in range(0, len(x), batch)]
    parts = [(p - p.mean(0)) / np.sqrt(p.var(0) + first.epsilon) * gamma + beta for p in parts]
    return x, np.concatenate([np.tanh(p @ kernel + bias) for p in parts])


def assert_statistics(layer, inputs, rtol=1e-5):
    inputs = inputs.reshape(-1, inputs.shape[-1])
    np.testing.assert_allclose(layer.moving_mean, inputs.mean(0), rtol=rtol, atol=rtol / 10)
    np.testing.assert_allclose(layer.moving_variance, inputs.var(0), rtol=rtol, atol=rtol / 10)


def forms(x):
    y, weights = np.zeros(len(x)), np.ones(len(x))
    return {
        "array": x,
        "tensor": tf.constant(x),
        "tuple": (x, y),
        "triple": (x, y, weights),
        "dataset": dataset(x),
        "dataset of pairs": dataset((x, y)),
        "generator": ((x[i : i + 7], y[i : i + 7]) for i in range(0, len(x), 7)),
        "sequence": Sequence(),
        "list": [x[i : i + 7] for i in range(0, len(x), 7)],
        "list of pairs": [(x[i : i + 7], y[i : i + 7]) for i in range(0, len(x), 7)],
    }


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 15

    def __getitem__(self, i):
        return X[7 * i : 7 * i + 7], np.zeros(len(X[7 * i : 7 * i + 7]))


@pytest.mark.parametrize("form", forms(X))
def test_statistics_are_those_of_the_whole_data(form):
    model = two_norms()
    assert reestimate(model, forms(X)[form], batch_size=7, verbose=0) == ["first", "second"]
    for name, inputs in zip(["first", "second"], by_hand(model, X), strict=True):
        assert_statistics(model.get_layer(name), inputs)


def test_batches_of_unknown_and_changing_size_are_weighted_by_count():
    sizes = [1, 40, 9, 50]
    starts = np.cumsum([0, *sizes[:-1]])
    batches = lambda: (X[i : i + n] for i, n in zip(starts, sizes, strict=True))
    data = tf.data.Dataset.from_generator(batches, output_signature=tf.TensorSpec((None, 3)))
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    reestimate(model, data, verbose=0)
    assert_statistics(model.layers[0], X)


def test_large_mean_does_not_swallow_the_variance():
    x = (1000.0 + RNG.normal(size=(100, 3)) * 0.1).astype("float32")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    reestimate(model, dataset(x), verbose=0)
    np.testing.assert_allclose(model.layers[0].moving_variance, x.astype("float64").var(0), rtol=1e-4)


@pytest.mark.parametrize("axis", [-1, 1])
def test_convolution_has_a_statistic_a_channel(axis):
    x = RNG.normal(size=(20, 5, 6, 3)).astype("float32")
    model = keras.Sequential([keras.Input((5, 6, 3)), layers.BatchNormalization(axis=axis)])
    reestimate(model, dataset(x), verbose=0)
    assert_statistics(model.layers[0], np.moveaxis(x, axis, -1))


def test_masked_positions_are_left_out():
    x = RNG.normal(size=(30, 6, 3)).astype("float32")
    lengths = RNG.integers(1, 7, size=30)
    for row, length in zip(x, lengths, strict=True):
        row[length:] = 0.0
    model = keras.Sequential([keras.Input((6, 3)), layers.Masking(), layers.BatchNormalization()])
    reestimate(model, dataset(x), verbose=0)
    assert_statistics(model.layers[1], x[x.any(-1)])


def test_wrapped_layer_sees_every_time_step():
    x = RNG.normal(size=(30, 6, 3)).astype("float32")
    norm = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((6, 3)), layers.TimeDistributed(norm)])
    assert len(reestimate(model, dataset(x), verbose=0)) == 1
    assert_statistics(norm, x)


def test_layer_called_twice_sees_both_inputs():
    norm = layers.BatchNormalization(name="norm")
    a, b = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([a, b], [norm(a), norm(b)])
    x, z = X, RNG.normal(size=(100, 3)).astype("float32")
    assert reestimate(model, [x, z], verbose=0) == ["norm"]
    assert_statistics(norm, np.concatenate([x, z]))


def test_inputs_in_a_dictionary():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    model = keras.Model({"a": a, "b": b}, layers.BatchNormalization(name="norm")(a + b))
    reestimate(model, ({"a": X, "b": X}, X), verbose=0)
    assert_statistics(model.get_layer("norm"), 2 * X)


class Nested(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [keras.Sequential([layers.BatchNormalization()]) for _ in range(2)]
        self.loop = layers.RNN(Cell())

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x, training=training)
        return self.loop(x[:, None, :] * tf.ones((1, 4, 1)), training=training)


class Cell(layers.Layer):
    state_size = output_size = 3

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()

    def call(self, x, states, training=None):
        return self.norm(x, training=training), states


def test_nested_layers_and_loops_are_found_and_unbuilt_models_built():
    model = Nested()
    assert len(reestimate(model, dataset(X), verbose=0)) == 3
    assert_statistics(model.blocks[0].layers[0], X)
    parts = [X[i : i + 7].astype("float64") for i in range(0, 100, 7)]
    for _ in range(2):
        parts = [(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-3) for p in parts]
    np.testing.assert_allclose(model.loop.cell.norm.moving_mean, 0.0, atol=1e-5)
    np.testing.assert_allclose(model.loop.cell.norm.moving_variance, np.concatenate(parts).var(0), rtol=1e-4)


def test_model_whose_call_takes_no_training():
    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = layers.BatchNormalization()

        def call(self, x):
            return self.norm(x)

    model = Plain()
    assert reestimate(model, dataset(X), verbose=0) == ["norm"]
    assert_statistics(model.norm, X)


class PartlyTrained(keras.Model):
    def __init__(self):
        super().__init__()
        self.inference, self.frozen, self.live = (layers.BatchNormalization() for _ in range(3))
        self.frozen.trainable = False

    def call(self, x, training=None):
        x = self.frozen(self.inference(x, training=False), training=training)
        return self.live(x, training=training)


def test_frozen_layers_and_those_called_for_inference_keep_their_statistics():
    model = PartlyTrained()
    assert reestimate(model, dataset(X), verbose=0) == ["live"]
    for layer in (model.inference, model.frozen):
        np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))
    assert_statistics(model.live, X / 1.001, rtol=1e-4)  # sqrt(1 + epsilon), twice


class SometimesInference(keras.Model):
    """Calls one layer for inference too, `more` times oftener in training than otherwise."""

    def __init__(self, more=0):
        super().__init__()
        self.norm = layers.BatchNormalization()
        self.more = more

    def call(self, x, training=None):
        y = (
            self.norm(x, training=training)
            - self.norm(10 + 5 * x, training=False)
            + self.norm(2 * x, training=training)
        )
        for _ in range(self.more if training else 0):
            y += self.norm(x, training=training)
        return y


def test_calls_for_inference_of_a_layer_that_is_also_trained_do_not_count():
    model = SometimesInference()
    assert reestimate(model, dataset(X), verbose=0) == ["norm"]
    assert_statistics(model.norm, np.concatenate([X, 2 * X]))


def test_calls_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match=r"'norm' is called 4 times in training, 1 of these .* and 3 times in infer"):
        reestimate(SometimesInference(more=1), dataset(X), verbose=0)


class Counting(layers.Layer):
    """Moves its state at every call, and keeps a metric and a seed."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.seen = keras.metrics.Sum(name="seen")
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x):
        self.calls.assign_add(1.0)
        self.seen.update_state(x)
        return x + 0.0 * keras.random.normal(keras.ops.shape(x), seed=self.seed)


def test_every_other_state_is_restored():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dropout(0.5),
            Counting(),
            layers.BatchNormalization(name="norm", momentum=0.3),
            layers.SpectralNormalization(layers.Dense(3)),
        ]
    )
    norm, counting = model.get_layer("norm"), model.layers[1]
    statistics = {id(norm.moving_mean), id(norm.moving_variance)}
    kept = [v for v in model.variables if id(v) not in statistics]
    kept += counting.seen.variables
    before = [v.numpy().copy() for v in kept]
    reestimate(model, dataset(X), verbose=0)
    assert_statistics(norm, X)  # and dropout was off
    for variable, value in zip(kept, before, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


def test_failing_data_leave_everything_as_it_was():
    def batches():
        yield X[:7]
        raise OSError("gone")

    model = two_norms()
    before = [w.numpy().copy() for w in model.weights]
    with pytest.raises(OSError, match="gone"):
        reestimate(model, batches(), verbose=0)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert "call" not in vars(model.get_layer("first"))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_has_the_statistics_of_what_enters(policy):
    model = two_norms(dtype=policy)
    reestimate(model, dataset(X), verbose=0)
    compute = keras.dtype_policies.get(policy).compute_dtype
    assert_statistics(model.get_layer("first"), tf.cast(tf.cast(X, compute), "float64").numpy())
    assert model.get_layer("first").moving_mean.dtype == "float32"


def test_renorm_keeps_its_square_root_in_step():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(renorm=True)])
    norm = model.layers[0]
    reestimate(model, dataset(X), verbose=0)
    assert_statistics(norm, X)
    np.testing.assert_allclose(norm.moving_stddev, np.sqrt(X.var(0) + norm.epsilon), rtol=1e-4)
    np.testing.assert_array_equal(norm.renorm_mean, 0.0)


def test_steps_bound_the_data_used():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    reestimate(model, dataset(X).repeat(), steps=4, verbose=0)
    assert_statistics(model.layers[0], X[:28])
    with pytest.raises(ValueError, match="no end"):
        reestimate(model, dataset(X).repeat(), verbose=0)
    with pytest.raises(ValueError, match="no batch"):
        reestimate(model, dataset(X).take(0), verbose=0)
    with pytest.raises(ValueError, match="no batch"):
        reestimate(model, [], verbose=0)


def test_model_without_batch_norm_returns_at_once_and_says_so(caplog):
    def batches():
        raise AssertionError("the data were read")
        yield

    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    assert reestimate(model, batches()) == []
    assert "no BatchNormalization" in caplog.text


def test_pass_is_compiled_once_a_shape():
    traces = []

    class Noting(layers.Layer):
        def call(self, x, training=None):
            traces.append(training)
            return x

    model = keras.Sequential([keras.Input((3,)), Noting(), layers.BatchNormalization()])
    traces.clear()
    reestimate(model, dataset(X), verbose=0)
    assert traces == [True, False, False]  # who trains; batches of 7; the last one
