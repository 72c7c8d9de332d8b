"""What a record says of single steps: the step's own values, and never a running one."""

import keras
import numpy as np
import pytest
from keras import layers

import tfloop
from tfloop.loop.observer import Observer

X = np.random.default_rng(0).normal(size=(10, 3)).astype("float32")
Y = np.random.default_rng(1).integers(0, 2, (10, 1)).astype("float32")
MODES = [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": "step"}, {"jit_compile": "loop"}]


class Rows(Observer, keras.callbacks.Callback):
    """Keeps what each step measured."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_built(self, loop, source, callbacks):
        loop.measure_each_step()

    def on_chunk(self, record, feed):
        names, values, _ = record.scalars()
        self.steps += [dict(zip(names, row, strict=True)) for row in values]
        return record


class Tracked(tfloop.Model):
    """A step of its own that returns running values, as Keras' documentation shows it."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1, activation="sigmoid")
        self.total = keras.metrics.Mean(name="loss")
        self.area = keras.metrics.AUC(name="auc")

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        y_pred = self(x, training=True)
        self.total.update_state(keras.losses.mean_squared_error(y, y_pred))
        self.area.update_state(y, y_pred)
        return {"loss": self.total.result(), "auc": self.area.result(), "raw": keras.ops.mean(y)}


def classifier(**mode):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = tfloop.Model(inputs, layers.Dense(1, activation="sigmoid")(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=["accuracy", keras.metrics.AUC(name="auc")], **mode)
    return model


def fit(model, *callbacks):
    return model.fit(X, Y, batch_size=4, shuffle=False, epochs=2, verbose=0, callbacks=list(callbacks)).history


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_compiled_metrics_are_measured_over_each_step_alone(mode):
    model, rows = classifier(**mode), Rows()
    history = fit(model, rows)
    right = (model.predict(X, verbose=0) > 0.5) == Y
    expected = [right[:4].mean(), right[4:8].mean(), right[8:].mean()]
    np.testing.assert_allclose([r["accuracy"] for r in rows.steps], 2 * expected)
    assert "auc" not in rows.steps[0]  # no mean: only its running value is known
    np.testing.assert_allclose(history["accuracy"], right.mean(), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_measuring_each_step_changes_no_bit_of_the_epochs_values(mode):
    assert fit(classifier(**mode), Rows()) == fit(classifier(**mode))


def test_running_values_of_a_step_of_ones_own_are_not_given_as_the_steps():
    model, rows = Tracked(), Rows()
    model.compile()
    history = fit(model, rows)
    errors = (model.predict(X, verbose=0) - Y)[:, 0] ** 2
    np.testing.assert_allclose(
        [r["loss"] for r in rows.steps[:3]], [e.mean() for e in np.split(errors, [4, 8])], rtol=1e-5
    )
    np.testing.assert_allclose([r["raw"] for r in rows.steps[:3]], [y.mean() for y in np.split(Y, [4, 8])], rtol=1e-6)
    assert "auc" not in rows.steps[0] and "auc" in history
    np.testing.assert_allclose(history["loss"], errors.mean(), rtol=1e-5)
