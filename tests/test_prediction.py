"""The model for prediction predicts what the training model does, with any targets."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tfloop.prediction import without_inputs

RNG = np.random.default_rng(0)
X = RNG.normal(size=(10, 4)).astype("float32")


def training_model(structure=list):
    x, y, w = keras.Input((4,), name="x"), keras.Input((2,), name="y"), keras.Input((), name="w")
    hidden = layers.Dense(3, activation="tanh", name="hidden")(x)
    y_pred = layers.Dense(2, name="y_pred")(hidden)
    error = layers.Lambda(lambda t: ops.mean((t[0] - t[1]) ** 2, -1), name="error")([y_pred, y])
    if structure is dict:
        inputs = {"features": x, "y": y, "w": w}
        return keras.Model(inputs, {"y_pred": y_pred, "code": hidden, "error": error})
    return keras.Model([x, y, w], [y_pred, hidden, error])


def test_prediction_is_that_with_any_targets_and_needs_none():
    model = training_model()
    prediction = without_inputs(model, ["y", "w"], outputs=["y_pred", "hidden"])
    for _ in range(2):
        y, w = RNG.normal(size=(10, 2)), RNG.normal(size=10)
        expected = model.predict([X, y, w], verbose=0)
        for got, want in zip(prediction.predict(X, verbose=0), expected[:2], strict=True):
            np.testing.assert_array_equal(got, want)


def test_weights_are_shared():
    model = training_model()
    prediction = without_inputs(model, ["y", "w"], outputs="y_pred")
    model.get_layer("y_pred").bias.assign([5.0, 5.0])
    np.testing.assert_array_equal(prediction(X), model([X, X[:, :2], X[:, 0]])[0])
    assert all(a is b for a, b in zip(prediction.weights, model.weights, strict=True))


@pytest.mark.parametrize("names", [["y", "w"], ["y"], "w"])
def test_dictionaries_stay_dictionaries(names):
    prediction = without_inputs(training_model(dict), names, outputs=["y_pred", "code"])
    assert set(prediction.input) == {"features", "y", "w"} - set(names)
    values = {"features": X, "y": X[:, :2], "w": X[:, 0]}
    result = prediction({k: values[k] for k in prediction.input})
    assert {k: v.shape for k, v in result.items()} == {"y_pred": (10, 2), "code": (10, 3)}


def test_input_has_the_name_of_its_layer_and_of_its_key():
    model = training_model(dict)
    for name in ("features", "x"):
        with pytest.raises(ValueError, match="needs 'features'"):
            without_inputs(model, [name])


def test_every_output_is_kept_by_default():
    prediction = without_inputs(training_model(), ["w"])
    assert [t.shape for t in prediction([X, X[:, :2]])] == [(10, 2), (10, 3), (10,)]


def test_output_that_needs_a_target_is_named():
    message = r"'error' needs 'y',.*outputs=\['y_pred', 'hidden'\]"
    with pytest.raises(ValueError, match=message):
        without_inputs(training_model(), ["y", "w"])
    with pytest.raises(ValueError, match=r"'error' needs 'y'.*None does without"):
        without_inputs(training_model(), ["y", "w"], outputs="error")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["z"],), "has no input 'z'. There is 'x', 'y', 'w'"),
        ((["y"], ["y_prod"]), "has no output 'y_prod'. Did you mean 'y_pred'"),
        ((["x", "y", "w"],), "has no input left"),
    ],
)
def test_wrong_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        without_inputs(training_model(), *arguments)


def test_model_without_a_graph_is_refused():
    class Subclassed(keras.Model):
        pass

    with pytest.raises(TypeError, match="no functional model"):
        without_inputs(Subclassed(), ["y"])
