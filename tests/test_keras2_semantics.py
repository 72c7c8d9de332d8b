"""What code written for Keras 2's `add_metric` and `add_loss` may rely on.

The programs of `keras2_scenarios.py` run here on tfloop, and in one subprocess on Keras 2 itself: the results must
agree. What follows cannot be compared, or differs from Keras 2 on purpose, and says so.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import subprocess
import sys

import keras
import keras2_scenarios as scenarios
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import tfloop


@pytest.fixture(scope="session")
def keras2(tmp_path_factory):
    """What every scenario saw under Keras 2. Parallel test processes share one run of it."""
    folder = tmp_path_factory.getbasetemp()
    results = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "keras2.json"
    with locked(results.with_suffix(".lock")):
        if not results.exists():
            script = pathlib.Path(__file__).with_name("keras2_scenarios.py")
            found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
            results.write_text(found.stdout)
    return json.loads(results.read_text())


@contextlib.contextmanager
def locked(path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_as_in_keras_2(name, keras2):
    expected = keras2[name]
    assert not str(expected).startswith("failed"), expected
    assert_agrees(plain(scenarios.SCENARIOS[name](scenarios.keras3())), expected)


def plain(value):
    return json.loads(json.dumps(value, default=float))


def assert_agrees(ours, theirs):
    """Equal, numbers to 1e-6. Logs have the same names in the same order; ours may also show the parts of the loss."""
    assert type(ours) is type(theirs) or {type(ours), type(theirs)} <= {int, float}, (ours, theirs)
    if isinstance(theirs, dict):
        assert [n for n in ours if n in theirs or not is_part_of_loss(n)] == list(theirs)
        for name, value in theirs.items():
            assert_agrees(ours[name], value)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), (ours, theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_agrees(one, other)
    elif isinstance(theirs, float) and not isinstance(theirs, bool):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6, nan_ok=True)
    else:
        assert ours == theirs


def is_part_of_loss(name):
    return name.removeprefix("val_") in ("compiled_loss", "other_losses")


# What cannot be compared, and where tfloop goes another way.

K = scenarios.keras3()
X, ZEROS = scenarios.X, scenarios.ZEROS
MODES = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "step": {"jit_compile": True},
    "loop": {"jit_compile": "loop"},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def fit(model, **options):
    """The values of one epoch on batches of 4, 4 and 2, nothing moving."""
    history = scenarios.fit(K, model, **{"batch_size": 4, "epochs": 1, **options})
    return {name: values[0] for name, values in history.items()}


def in_model(call, **attributes):
    return scenarios.subclassed(K, call, **attributes)


def test_the_second_argument_is_the_name_whatever_it_says():
    """Before Keras 2.2 it was the aggregation; such a call makes a metric named "mean", in both."""
    assert fit(in_model(lambda self, x, training: self.add_metric(x, "mean"))) == {"loss": 4.5, "mean": 4.5}


def test_an_aggregation_that_does_not_exist_is_an_error():
    """Keras 2 took any and computed the mean."""
    model = in_model(lambda self, x, training: self.add_metric(x, name="m", aggregation="median"))
    with pytest.raises(ValueError, match=r"'median'.*'mean', 'sum', 'min', 'max', 'last'"):
        fit(model)


def test_one_name_with_two_aggregations_is_an_error():
    def call(self, x, training):
        self.add_metric(x, name="m")
        self.add_metric(x, name="m", aggregation="max")

    with pytest.raises(ValueError, match=r"'max'.*'mean'"):
        fit(in_model(call))


def test_a_metric_object_instead_of_its_result_is_named_in_the_error():
    model = in_model(lambda self, x, training: self.add_metric(self.mean), mean=keras.metrics.Mean(name="mine"))
    with pytest.raises(TypeError, match=r"'mine'.*add_metric\(self\.mine"):
        fit(model)


def test_a_metric_object_made_anew_in_every_call():
    """Keras 2 failed in graphs and logged old values eagerly. Its variables cannot be made in a step: an error."""
    model = in_model(lambda self, x, training: self.add_metric(keras.metrics.Mean(name="new")(x)))
    with pytest.raises((ValueError, RuntimeError)):
        fit(model)


@pytest.mark.parametrize("value", ["text", object(), None, [None]], ids=["str", "object", "None", "list"])
def test_what_is_no_number_is_an_error(value):
    with pytest.raises(TypeError, match="'m'"):
        fit(in_model(lambda self, x, training: self.add_metric(value, name="m")))
    with pytest.raises((TypeError, ValueError), match=r"add_loss|number"):
        fit(in_model(lambda self, x, training: self.add_loss(value, name="m")))


def test_the_errors_of_plain_tensors_outside_call_say_what_to_do():
    model = scenarios.functional(K)
    with pytest.raises(ValueError, match="add a function of the step's tensors"):
        model.add_metric(tf.constant(1.0), name="m")
    with pytest.raises(ValueError, match=r"add_loss\(lambda"):
        model.add_loss(tf.constant(1.0))


def test_a_metric_result_on_a_functional_model_is_an_error():
    model = scenarios.functional(K)
    with pytest.raises(ValueError, match="Outside"):
        model.add_metric(keras.metrics.Mean(name="m")(X), name="m")


def test_no_gradient_flows_back_through_a_metric():
    layer = scenarios.adding(K, lambda self, x: self.add_metric(x, name="m"))
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        layer(x)
        result = layer.metrics[0].result()
    assert tape.gradient(result, x) is None


# Inside loops and branches.


class Cell(tfloop.Layer):
    state_size = output_size = 1

    def call(self, x, states):
        self.add_metric(ops.mean(x), name="m")
        return x, [states[0] + x]


@every_mode
@pytest.mark.parametrize("unroll", [False, True])
def test_in_an_rnn_cell_every_time_step_counts_once(mode, unroll):
    """Keras calls the cell once more, to learn the output's shape; Keras 2 counted that too (5.25)."""
    inputs = keras.Input((3, 1))
    model = tfloop.Model(inputs, scenarios.identity(K)(keras.layers.RNN(Cell(), unroll=unroll)(inputs)))
    logs = fit(model, x=np.stack([X, X + 1, X + 2], 1), **mode)
    assert logs["m"] == pytest.approx(5.5, rel=1e-6)


@every_mode
def test_in_a_while_loop_and_in_a_branch(mode):
    def call(self, x, training):
        def branch():
            self.add_metric(ops.mean(x), name="branch")
            return x

        def body(i, y):
            self.add_metric(ops.mean(x) + tf.cast(i, tf.float32), name="loop")
            return i + 1, y

        tf.while_loop(lambda i, y: i < 3, body, (0, tf.cond(tf.reduce_mean(x) > -1, branch, lambda: -x)))

    assert fit(in_model(call), **mode) == pytest.approx({"loss": 4.5, "branch": 4.5, "loop": 5.5}, rel=1e-6)


class Spreads(tfloop.Layer):
    def call(self, x):
        self.add_metric(x, name="m")
        return x

    def compute_output_shape(self, shape):
        return shape


def test_in_a_time_distributed_layer():
    inputs = keras.Input((3, 1))
    model = tfloop.Model(inputs, scenarios.identity(K)(keras.layers.TimeDistributed(Spreads())(inputs)))
    logs = fit(model, x=np.stack([X, X + 1, X + 2], 1), y=np.zeros((10, 3, 1), "float32"))
    assert logs["m"] == pytest.approx(5.5, rel=1e-6)


# When it may be added.


def test_after_compile_without_a_loss():
    """The order of the post: compile, then say what to look at. Keras 2 raised a TypeError."""
    inputs = keras.Input((1,))
    model = tfloop.Model(inputs, outputs := scenarios.identity(K)(inputs))
    model.add_loss(ops.mean((outputs - inputs) ** 2))
    model.compile(keras.optimizers.SGD(0.0))
    model.add_metric(ops.mean(outputs), name="symbolic")
    model.add_metric(lambda t: ops.mean(t["x"]), name="function")
    history = model.fit(X, None, batch_size=4, shuffle=False, verbose=0).history
    assert list(history) == ["loss", "symbolic", "function"]
    assert [history[name][0] for name in history] == pytest.approx([0.0, 4.5, 4.5], rel=1e-6)


@every_mode
def test_after_a_fit_it_takes_effect_in_the_next(mode):
    """Keras 2 logged garbage or nothing until the next compile."""
    inputs = keras.Input((1,))
    model = tfloop.Model(inputs, outputs := scenarios.identity(K)(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mae", **mode)
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    assert list(model.fit(X, ZEROS, **options).history) == ["loss"]
    model.add_metric(ops.mean(outputs), name="late")
    model.add_loss(ops.mean(outputs**2), name="later")
    history = model.fit(X, ZEROS, **options).history
    assert {n: v[0] for n, v in history.items()} == pytest.approx(
        {"loss": 33.0, "compiled_loss": 4.5, "later": 28.5, "late": 4.5}, rel=1e-6
    )
    model.watch("y_pred", "max")
    assert model.evaluate(X, ZEROS, batch_size=4, verbose=0, return_dict=True)["y_pred/max"] == 9.0


# A tfloop.Layer in a plain Keras model, trained by Keras' own fit.


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=["default", "eager", "xla"])
def test_a_layer_under_keras_own_fit_weighs_batches_alike(mode):
    def call(self, x):
        self.add_loss(ops.mean(x), name="named", weight=2.0)
        self.add_metric(ops.mean(x), name="by_batch")
        self.add_metric(x, name="by_example")
        self.add_metric(x, name="largest", aggregation="max")

    inputs = keras.Input((1,))
    outputs = scenarios.identity(K)(scenarios.adding(K, call)(inputs))
    logs = fit(keras.Model(inputs, outputs), validation_data=(X[:4], ZEROS[:4]), **mode)
    mean = (1.5 + 5.5 + 8.5) / 3
    expected = {"loss": 13.5, "by_batch": mean, "by_example": 4.5, "largest": 9.0}
    expected |= {"val_loss": 4.5, "val_by_batch": 1.5, "val_by_example": 1.5, "val_largest": 3.0}
    assert logs == pytest.approx(expected, rel=1e-6)


def test_a_layer_under_keras_own_fit_is_reset_every_epoch():
    layer = scenarios.adding(K, lambda self, x: self.add_metric(x, name="m"))
    inputs = keras.Input((1,))
    history = scenarios.fit(K, keras.Model(inputs, scenarios.identity(K)(layer(inputs))), epochs=3)
    assert history["m"] == pytest.approx([4.5] * 3, rel=1e-6)
