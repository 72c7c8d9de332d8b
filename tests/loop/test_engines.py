"""Engines: each traces once, and all do the same."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from loop_models import ENGINES, Chunks, Counting, compiled, data, dataset, fresh

import tfloop
from tfloop.loop import engine as engines
from tfloop.loop.source import make_source
from tfloop.operation import Operation


def fitted(x, y, options, **arguments):
    model = fresh(**options)
    arguments = {"batch_size": 4, "epochs": 2, "verbose": 0, **arguments}
    return model, model.fit(x, y, **arguments).history


@pytest.mark.parametrize("engine", ["graph", "jit", "scan"])
def test_one_trace_for_each_form_of_batch(engine):
    model = fresh(**ENGINES[engine])
    x, y = data(48)
    model.fit(x, y, batch_size=4, epochs=3, verbose=0)
    assert model.calls == 1
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    model.fit(x[:24], y[:24], batch_size=4, verbose=0)  # other chunks, same batches
    assert model.calls == 1
    for _ in range(2):
        model.fit(x[:22], y[:22], batch_size=4, verbose=0)  # the short batch at the end is another form
        assert model.calls == 2


@pytest.mark.parametrize("jit_compile, traces", [(False, 1), ("step", 2), ("loop", 2)])
def test_a_recurrent_layer_above_others_is_compiled_with_lists_that_xla_can_make(jit_compile, traces):
    x = np.random.default_rng(0).normal(size=(8, 5, 2)).astype("float32")
    seen = []

    def history(kind, **options):
        class Recurrent(kind):
            def __init__(self):
                super().__init__()
                self.inner, self.lstm, self.out = layers.Dense(3), layers.LSTM(3), layers.Dense(1)

            def call(self, x, training=False):
                seen.append((kind, training))
                return self.out(self.lstm(self.inner(x)))

        keras.utils.set_random_seed(0)
        model = Recurrent()
        model.compile(keras.optimizers.Adam(0.1), "mse", **options)
        targets = x.sum((1, 2))
        return model.fit(x, targets, 4, epochs=3, shuffle=False, verbose=0, validation_data=(x, targets)).history

    ours, theirs = history(tfloop.Model, jit_compile=jit_compile), history(keras.Model, jit_compile=True)
    assert seen.count((tfloop.Model, True)) == traces
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4)


def test_changing_the_engine_or_its_trial_traces_no_step_anew():
    model = fresh(**ENGINES["graph"])
    x, y = data(16)
    model.fit(x, y, batch_size=4, verbose=0)
    source = make_source(x, y, None, 4)
    program = model._tfloop_loop._runner.program("train", source.spec)
    calls = model.calls
    feed = source.sample(4, 4)
    for engine in ("graph", "jit", "scan"):
        model._tfloop_loop._runner.run(engine, "train", feed, 0)
    assert model.calls == calls and program.layout is not None


def test_engines_agree_after_fifty_steps():
    x, y = data(200)
    found = {e: fitted(x, y, options, epochs=1)[0].get_weights() for e, options in ENGINES.items()}
    for weights in (found[e] for e in ("graph", "jit", "scan")):
        for ours, eager in zip(weights, found["eager"], strict=True):
            np.testing.assert_allclose(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 5}, {"steps_per_execution": 16}])
def test_steps_made_together_are_the_same_steps(options, monkeypatch):
    """40 batches and a short one, 16 together: chunks of 40, of 5 and of 16."""
    x, y = data(162)
    options = {**ENGINES["scan"], **options}
    apart, history = fitted(x, y, options)
    monkeypatch.setattr(engines, "on_gpu", lambda: True)
    together, other_history = fitted(x, y, options)
    assert tfloop.fingerprint(apart) == tfloop.fingerprint(together)
    assert history == other_history


@pytest.mark.parametrize("engine", ["graph", "jit", "scan"])
def test_arrays_of_another_length_in_chunks_of_the_same(engine):
    x, y = data(48)
    histories = []
    for options in (ENGINES["eager"], {**ENGINES[engine], "steps_per_execution": 2}):
        model = fresh(**options)
        sizes = (24, 48, 40)
        histories.append([model.fit(x[:n], y[:n], batch_size=4, verbose=0).history["loss"] for n in sizes])
    np.testing.assert_allclose(*histories, rtol=1e-5)


@pytest.mark.parametrize(("how", "compiled"), [("graph", False), ("jit", True), ("scan", True)])
def test_what_is_to_be_compiled_is_handed_to_xla(how, compiled, monkeypatch):
    functions = []
    monkeypatch.setattr(engines, "Operation", lambda function: functions.append(function) or Operation(function))
    fresh(**ENGINES[how]).fit(*data(16), batch_size=4, verbose=0)
    graphs = [function.graph.as_graph_def() for function in functions]
    nodes = [n for graph in graphs for n in (*graph.node, *(n for f in graph.library.function for n in f.node_def))]
    assert any(n.attr["_XlaMustCompile"].b for n in nodes) == compiled


FORMS = {
    "arrays": lambda x, y: {"x": x, "y": y, "batch_size": 4},
    "dataset": lambda x, y: {"x": dataset(x, y, 4)},
    "loader": lambda x, y: {"x": [(x[i : i + 4], y[i : i + 4]) for i in range(0, len(x), 4)].__iter__()},
}


@pytest.mark.parametrize("form", ["arrays", "dataset", "loader"])
@pytest.mark.parametrize("engine", ["graph", "jit", "scan"])
def test_logs_are_the_same_whatever_runs_the_steps(engine, form):
    """Batches of 4, 4 and 2: what is shuffled, drawn and logged is the same in every engine."""
    x, y = data(10)
    logs = []
    for options in (ENGINES["eager"], ENGINES[engine]):
        model = fresh(lambda: Counting(dropout=0.3), **options)
        epochs = 1 if form == "loader" else 3
        logs.append(model.fit(**FORMS[form](x, y), epochs=epochs, verbose=0).history)
    assert list(logs[0]) == list(logs[1]) == ["loss", "accuracy"]
    for name in logs[0]:
        np.testing.assert_allclose(logs[0][name], logs[1][name], rtol=1e-5)


@pytest.mark.parametrize("engine", ["graph", "scan"])
def test_steps_per_execution_changes_nothing_but_the_chunks(engine):
    x, y = data(26)
    runs = {n: fitted(x, y, {**ENGINES[engine], "steps_per_execution": n}) for n in (1, 3, "auto")}
    for _, history in runs.values():
        for name, values in history.items():
            np.testing.assert_allclose(values, runs[1][1][name], rtol=1e-6)
    assert len({tfloop.fingerprint(model) for model, _ in runs.values()}) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_one_example(engine):
    x, y = data(1)
    model, history = fitted(x, y, ENGINES[engine], batch_size=32)
    assert len(history["loss"]) == 2 and np.isfinite(history["loss"]).all()
    assert model.predict(x, verbose=0).shape == (1, 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_epoch_shorter_than_a_chunk(engine):
    x, y = data(8)
    chunks = Chunks()
    fitted(x, y, ENGINES[engine] | {"steps_per_execution": 100}, callbacks=[chunks], epochs=3)
    assert sum(chunks.lengths) == 6 and all(n <= 2 for n in chunks.lengths)


@pytest.mark.parametrize("engine", ENGINES)
def test_columns_are_in_the_order_in_which_they_are_shown(engine):
    x, y = data(20)
    model = fresh(**ENGINES[engine])
    model.add_metric(lambda t: tf.reduce_max(t["hidden"]), name="peak", aggregation="max")
    model.add_loss(lambda t: tf.reduce_mean(t["hidden"] ** 2), name="size")
    model.watch("hidden", "rms", every=3)
    model.watch("gradients/*/kernel", "norm")
    chunks = Chunks()
    history = model.fit(x, y, batch_size=4, verbose=0, callbacks=[chunks]).history
    expected = ["loss", "compiled_loss", "size", "accuracy", "peak", "hidden/rms"]
    expected += ["gradients/hidden/kernel/norm", "gradients/logits/kernel/norm"]
    assert list(history) == expected
    names, values, due = chunks.records[0].scalars()
    assert names == [n for n in expected if n != "accuracy"]
    assert values.shape[1] == due.shape[1] == len(names)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_nth_step(engine):
    x, y = data(28)
    model = fresh(**ENGINES[engine])
    model.watch("hidden", "rms", every=3)
    model.watch("logits", "histogram", every=2)
    chunks = Chunks()
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[chunks])
    seen = {}
    for record in chunks.records:
        names, values, due = record.scalars()
        column = names.index("hidden/rms")
        for i in range(len(record)):
            seen[record.first + i] = due[i, column] and np.isfinite(values[i, column])
    assert [step for step, there in sorted(seen.items()) if there] == [0, 3, 6]
    histograms = [(name, step, counts.sum()) for r in chunks.records for name, step, counts in r.histograms()]
    assert histograms and all(n == "logits/histogram" and s % 2 == 0 and c == 12 for n, s, c in histograms)


@pytest.mark.parametrize("engine", ["graph", "jit", "scan"])
def test_metric_objects_are_updated_in_the_loop(engine):
    x, y = data(50)
    _, history = fitted(x, y, ENGINES[engine], epochs=1, shuffle=False)
    _, expected = fitted(x, y, ENGINES["eager"], epochs=1, shuffle=False)
    assert history["accuracy"] == pytest.approx(expected["accuracy"], rel=1e-6)


def test_values_that_nobody_asked_for_are_not_computed():
    inputs = keras.Input((6,))
    hidden = layers.Dense(4, name="hidden")(inputs)
    model = compiled(tfloop.Model(inputs, layers.Dense(3)(hidden)), jit_compile=False)
    x, y = data(8)
    model.fit(x, y, verbose=0)
    (program,) = model._tfloop_loop._runner._programs.values()
    assert program.layout.order == ("loss", "accuracy")
    assert "Histogram" not in " ".join(program.operations)
