"""The tuner: what it chooses, what it spends, and that it leaves no trace."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from loop_models import ENGINES, Counting, data, dataset, fresh

import tfloop
from tfloop import _keras
from tfloop.loop import tuner
from tfloop.loop.engine import COMPILED
from tfloop.loop.source import make_source
from tfloop.weights import SpectralNorm


class Clock:
    """A clock that a fake `Runner` moves on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Runner:
    """Runs nothing: compiling and stepping take the seconds that the test says."""

    def __init__(self, clock, step, compiling, fails=()):
        self._clock, self._step, self._compiling, self._fails = clock, step, compiling, fails
        self.runs = []
        self.program_ = Program()

    def program(self, kind, spec):
        return self.program_

    def takes_blocks(self, engine, kind):
        return engine in COMPILED

    def run(self, engine, kind, feed, first):
        if engine in self._fails:
            self._clock.now += self._compiling[engine]
            raise tf.errors.InvalidArgumentError(None, None, "Detected unsupported operations: Unique\nand more")
        if engine not in self.runs:
            self._clock.now += self._compiling[engine]
        self.runs.append(engine)
        self._clock.now += self._step[engine] * feed.count
        self.program_.variable.assign_add(1.0)


class Program:
    step = None

    def __init__(self, operations=("MatMul",) * 200):
        self.variable = tf.Variable(0.0)
        self.variables = [self.variable]
        self.operations = list(operations)
        self.layout = type("Layout", (), {"notes": ()})
        self.spec = (tf.TensorSpec((4, 6)), tf.TensorSpec((4,), tf.int64))


SMALL = {"graph": 1e-3, "jit": 0.6e-3, "scan": 0.2e-3}
LARGE = {"graph": 0.10, "jit": 0.07, "scan": 0.08}
COMPILING = {"graph": 0.5, "jit": 0.8, "scan": 0.9}


def chosen(steps, step=SMALL, compiling=COMPILING, fails=(), operations=None, tests=0):
    clock = Clock()
    runner = Runner(clock, step, compiling, fails)
    if operations:
        runner.program_ = Program(operations)
    x, y = data(40)
    choice = tuner.Tuner(runner, clock).choose(make_source(x, y, None, 4), steps, tests, 10)
    return choice, runner, clock.now


def test_the_fastest_wins():
    choice, runner, _ = chosen(1_000_000)
    assert choice.engine == "scan" and set(choice.seconds) == {"graph", "jit", "scan"}
    assert "scan" in choice.why and "graph 1" in choice.why and "\n" not in choice.why
    assert runner.program_.variable.numpy() == 0  # nothing is left of the trial


def test_a_graph_that_is_as_fast_is_kept():
    assert chosen(1_000_000, {"graph": 0.1, "jit": 0.099, "scan": 0.12})[0].engine == "graph"


def test_a_run_that_is_over_sooner_is_not_compiled():
    choice, runner, _ = chosen(500)  # half a second
    assert choice.engine == "graph" and set(runner.runs) == {"graph"} and not choice.why


def test_a_tiny_run_is_not_even_measured():
    _, runner, spent = chosen(40)
    assert not runner.runs and spent == 0


@pytest.mark.parametrize("steps", [100, 1000, 5000, 20_000, 100_000, 1_000_000])
@pytest.mark.parametrize("step", [SMALL, LARGE])
def test_a_trial_costs_little_of_the_run(steps, step):
    choice, _, spent = chosen(steps, step)
    best = min(step.values())
    without_trial = steps * step["graph"]
    assert spent - COMPILING["graph"] <= 10.5
    lost = spent - COMPILING["graph"] + steps * step[choice.engine] - without_trial
    assert lost <= 0.06 * max(without_trial, steps * best)


def test_a_step_that_is_50_times_slower_is_given_up():
    _, runner, spent = chosen(100_000, {"graph": 7e-3, "jit": 6e-3, "scan": 0.4})
    assert runner.runs.count("scan") <= 7 and spent < 10


def test_no_trial_takes_ten_seconds():
    _, _, spent = chosen(10**9, dict.fromkeys(SMALL, 0.5), {"graph": 1.0, "jit": 60.0, "scan": 60.0})
    assert spent < 70  # the compilation that was begun is not interrupted, but no second one is
    choice, runner, _ = chosen(10**9, dict.fromkeys(SMALL, 0.5), {"graph": 9.0, "jit": 60.0, "scan": 60.0})
    assert set(runner.runs) == {"graph"} and choice.engine == "graph"


def test_what_cannot_compile_is_dropped_with_its_reason():
    choice, _, _ = chosen(1_000_000, fails=("scan", "jit"))
    assert choice.engine == "graph" and "scan" in choice.why and "Unique" in choice.why and "more" not in choice.why


def test_convolutions_are_not_tried_in_a_compiled_loop_on_cpus(monkeypatch):
    monkeypatch.setattr(tuner, "on_gpu", lambda: False)
    choice, runner, _ = chosen(1_000_000, LARGE, operations=["Conv2D", "Conv2DBackpropFilterV2"] * 50)
    assert set(runner.runs) == {"graph", "jit"} and choice.engine == "jit"
    monkeypatch.setattr(tuner, "on_gpu", lambda: True)
    _, runner, _ = chosen(1_000_000, LARGE, operations=["Conv2D", "Conv2DBackpropFilterV2"] * 50)
    assert set(runner.runs) == {"graph", "jit", "scan"}


def test_gpus_are_given_more_time_to_compile(monkeypatch):
    slow = {"graph": 7.0, "scan": 15.0, "jit": 15.0}
    for gpu, engines in ((False, {"graph"}), (True, {"graph", "scan", "jit"})):
        monkeypatch.setattr(tuner, "on_gpu", lambda gpu=gpu: gpu)
        assert set(chosen(10_000_000, LARGE, slow)[1].runs) == engines


@pytest.mark.parametrize("operation", ["RandomUniform", "EagerPyFunc"])
def test_what_cannot_be_taken_back_is_not_tried(operation):
    choice, runner, _ = chosen(1_000_000, operations=["MatMul", operation])
    assert choice.engine == "graph" and not runner.runs


def test_evaluation_is_compiled_where_that_pays():
    assert chosen(1_000_000, tests=10)[0].evaluation == "graph"
    assert chosen(1_000_000, tests=1_000_000)[0].evaluation == "scan"


def test_a_second_fit_uses_the_choice_of_the_first():
    clock = Clock()
    runner = Runner(clock, SMALL, COMPILING)
    x, y = data(40)
    tuned, source = tuner.Tuner(runner, clock), make_source(x, y, None, 4)
    first = tuned.choose(source, 1_000_000, 0, 10)
    runs = len(runner.runs)
    second = tuned.choose(source, 100, 0, 10)
    assert second.engine == first.engine and len(runner.runs) == runs and not second.why


def test_a_run_of_unknown_length_is_a_graph():
    assert chosen(None)[0].engine == "graph"


def test_a_choice_goes_through_json():
    choice = chosen(1_000_000)[0]
    again = tuner.given(json.loads(json.dumps(choice.as_dict())))
    assert (again.engine, again.evaluation, again.seconds) == (choice.engine, choice.evaluation, choice.seconds)
    assert tuner.given("jit").evaluation == "jit"


# With real engines.


def noclock(monkeypatch):
    def clock():
        raise AssertionError("no clock decides here")

    monkeypatch.setattr(tuner.Tuner, "choose", lambda *_: clock())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_explicit_choice_is_obeyed_without_a_clock(engine, monkeypatch):
    noclock(monkeypatch)
    model = fresh(**ENGINES[engine])
    x, y = data(8)
    model.fit(x, y, batch_size=4, verbose=0)
    assert model.engine == engine == model._tfloop_loop.choice["engine"]


def test_a_recorded_choice_is_obeyed(monkeypatch):
    noclock(monkeypatch)
    model = fresh()
    model._tfloop_get_loop().use({"engine": "scan", "evaluation": "graph"})
    x, y = data(8)
    model.fit(x, y, batch_size=4, verbose=0)
    assert model.engine == "scan" and model._tfloop_loop.choice["evaluation"] == "graph"


def test_deterministic_operations_leave_nothing_to_a_clock(monkeypatch):
    monkeypatch.setattr(_keras, "is_op_determinism_enabled", lambda: True)
    assert _keras.are_operations_deterministic()
    assert chosen(1_000_000)[0].engine == "graph" and not chosen(1_000_000)[1].runs


def test_the_question_for_determinism_is_answered():
    assert _keras.are_operations_deterministic() is False


class Stateful(Counting):
    """Has every kind of state that a step moves."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.normalise = layers.BatchNormalization()

    def call(self, x, training=None):
        return super().call(self.normalise(x, training=training), training=training)


def long_run(monkeypatch):
    """Makes every trial pay."""
    monkeypatch.setattr(tuner, "LEAST", 1)
    monkeypatch.setattr(tuner, "MEASURED", 1e-4)
    monkeypatch.setattr(tuner.Trial, "_pays", lambda self, engine: True)


@pytest.mark.parametrize("form", ["arrays", "dataset"])
def test_a_trial_leaves_no_trace(form, monkeypatch, capsys):
    x, y = data(24)
    feeds = {"x": x, "y": y, "batch_size": 4} if form == "arrays" else {"x": dataset(x, y, 4)}
    long_run(monkeypatch)
    states, choice = [], None
    for trial in (True, False):
        model = fresh(Stateful)
        model.parametrize("hidden/kernel", SpectralNorm())
        if not trial:
            model._tfloop_get_loop().use(choice)
        before = []
        model.fit(**feeds, epochs=2, verbose=1, callbacks=[AtBegin(before)])
        choice = model._tfloop_loop.choice
        states.append([*before, tfloop.fingerprint(model), model.history.history])
    assert states[0] == states[1]
    assert set(model._tfloop_loop.choice) == {"engine", "evaluation", "seconds"}
    assert capsys.readouterr().out.count("Engine ") == 1


class AtBegin(keras.callbacks.Callback):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def on_train_begin(self, logs=None):
        self.found.append(tfloop.fingerprint(self.model))


def test_a_trial_says_nothing_when_nothing_is_to_be_shown_and_gives_back_what_compiling_took(monkeypatch, capsys):
    long_run(monkeypatch)
    given_back = []
    monkeypatch.setattr(tuner.memory, "give_back", lambda: given_back.append(True))
    x, y = data(24)
    model = fresh()
    model.fit(x, y, batch_size=4, verbose=0)
    assert capsys.readouterr().out == "" and len(model._tfloop_loop.choice["seconds"]) == 3
    assert given_back == [True]


def uncompilable(y_true, y_pred):
    text = tf.strings.as_string(tf.stop_gradient(y_pred))
    return tf.reduce_mean(tf.square(y_pred) + tf.strings.to_number(text))


def test_a_model_that_xla_cannot_compile_trains_as_a_graph(monkeypatch, capsys):
    long_run(monkeypatch)
    x, y = data(24)
    model = Counting()
    model.compile("sgd", uncompilable)
    model.fit(x, y, batch_size=4, verbose=1)
    assert model.engine == "graph" and np.isfinite(model.history.history["loss"]).all()
    assert "Not scan: " in capsys.readouterr().out


def test_numpy_in_a_loss_is_said_once_a_fit_and_is_an_error_where_asked_for(capsys):
    x, y = data(8)
    for jit_compile in ("auto", True, "loop"):
        model = Counting()
        model.compile("sgd", tfloop.numpy_loss(lambda a, b: float(np.mean(b**2))), jit_compile=jit_compile)
        if jit_compile == "auto":
            model.fit(x, y, batch_size=4, epochs=2, verbose=2)
            assert model.engine == "graph" and capsys.readouterr().out.count("XLA") == 1
        else:
            with pytest.raises(ValueError, match="XLA"):
                model.fit(x, y, batch_size=4, verbose=0)
