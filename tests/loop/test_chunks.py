"""Chunks: how many steps run in one call, and what is seen between two."""

import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from loop_models import ENGINES, Chunks, Counting, Seen, data, dataset, fresh

from tfloop.loop.pace import Pace


def test_a_chunk_follows_the_clock():
    pace = Pace("auto", by_step=False)
    lengths = []
    for _ in range(6):
        lengths.append(pace.next())
        pace.ran(pace.next(), 0.001 * pace.next())  # a step of a millisecond
    assert lengths[:2] == [1, 1] and lengths[-1] == 100
    pace.ran(100, 100 * 0.05)  # steps have become slow
    assert pace.next() == 2
    pace.ran(2, 10.0)
    assert pace.next() == 1


def test_the_time_of_a_step_that_is_known_sets_the_first_chunk():
    pace = Pace("auto", by_step=False)
    pace.expect(0.001)
    assert pace.next() == 100
    fixed = Pace(7, by_step=False)
    fixed.expect(0.001)
    assert fixed.next() == 7


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_an_explicit_length_is_obeyed(steps_per_execution):
    x, y = data(40)
    chunks = Chunks()
    model = fresh(jit_compile=False, steps_per_execution=steps_per_execution)
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[chunks])
    assert chunks.lengths == {1: [1] * 20, 3: [3, 3, 3, 1] * 2}[steps_per_execution]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_observer_bounds_chunks(engine):
    x, y = data(40)
    chunks = Chunks(most=4)
    fresh(**ENGINES[engine]).fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[chunks])
    assert max(chunks.lengths) <= 4 and sum(chunks.lengths) == 30
    ends = np.cumsum(chunks.lengths)
    assert {10, 20, 30} <= set(ends)  # no chunk goes across the end of an epoch


@pytest.mark.parametrize("engine", ENGINES)
def test_a_callback_with_batch_hooks_sees_every_step(engine):
    """The running values as of that step, and the model as of that step."""

    class Watching(Seen):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            self.updates.append(int(self.model.optimizer.iterations.numpy()))

    x, y = data(22)
    seen = Watching()
    seen.updates = []
    model = fresh(**ENGINES[engine])
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[seen]).history
    assert seen.ends == [0, 1, 2, 3, 4, 5] * 2
    assert seen.updates == list(range(1, 13))
    assert seen.logs[5] == pytest.approx({name: values[0] for name, values in history.items()})
    assert len({logs["loss"] for logs in seen.logs[:6]}) == 6


@pytest.mark.parametrize("engine", ["graph", "scan"])
def test_stop_training_takes_effect_at_the_next_chunk(engine):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 2

    x, y = data(40)
    seen = Seen()
    fresh(**ENGINES[engine]).fit(x, y, batch_size=4, epochs=5, verbose=0, callbacks=[Stop(), seen])
    assert seen.ends == [0, 1, 2]


@pytest.mark.parametrize("engine", ["graph", "scan"])
def test_ctrl_c_takes_effect_at_the_next_chunk(engine):
    class Interrupt(Chunks):
        def on_chunk(self, record, feed):
            if len(self.lengths) == 2:
                signal.raise_signal(signal.SIGINT)
            return super().on_chunk(record, feed)

    x, y = data(400)
    interrupt = Interrupt(most=2)
    model = fresh(**ENGINES[engine])
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, batch_size=4, epochs=50, verbose=0, callbacks=[interrupt])
    assert 4 <= int(model.optimizer.iterations.numpy()) <= 8
    model.fit(x, y, batch_size=4, verbose=0)  # and the model is as usable as before


def test_running_values_are_published_when_somebody_listens():
    class Listening(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.seen = {m.name: float(m.result()) for m in self.model.metrics if m.name == "width"}

    x, y = data(12)
    model = fresh()
    model.add_metric(lambda t: tf.reduce_max(t["hidden"]), name="width")
    listening = Listening()
    history = model.fit(x, y, verbose=0, callbacks=[listening]).history
    assert listening.seen["width"] == pytest.approx(history["width"][0])
    model.fit(x, y, verbose=0)
    assert float(model.metrics[-1].result()) == pytest.approx(model.history.history["width"][-1])


class Broken(Exception):
    pass


def broken_batches(x, y, good):
    for i in range(good):
        yield x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]
    raise Broken("the disk is gone")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_generator_that_raises_raises_its_own_error_at_its_place(engine):
    x, y = data(40)
    model, chunks = fresh(**ENGINES[engine]), Chunks()
    with pytest.raises(Broken, match="the disk is gone"):
        model.fit(broken_batches(x, y, 5), steps_per_epoch=10, verbose=0, callbacks=[chunks])
    assert sum(chunks.lengths) == 5 and int(model.optimizer.iterations.numpy()) == 5
    whole = fresh(**ENGINES[engine])
    whole.fit(x[:20], y[:20], batch_size=4, shuffle=False, verbose=0)
    for ours, expected in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dataset_that_raises_raises_at_its_place(engine):
    x, y = data(40)
    batches = dataset(x, y, 4).enumerate()
    batches = batches.map(lambda i, b: (tf.debugging.check_numerics(b[0] / tf.cast(5 - i, b[0].dtype), "bad"), b[1]))
    model, chunks, seen = fresh(**ENGINES[engine]), Chunks(), Seen()
    with pytest.raises(tf.errors.InvalidArgumentError, match="bad"):
        model.fit(batches, verbose=0, callbacks=[chunks, seen])
    assert sum(chunks.lengths) == len(seen.ends) == 5
    assert int(model.optimizer.iterations.numpy()) == int(model.extra_state()["updates"].numpy()) == 5


def test_the_rows_before_an_error_are_seen_when_a_chunk_is_long():
    x, y = data(40)
    batches = dataset(x, y, 4).enumerate()
    batches = batches.map(lambda i, b: (tf.debugging.check_numerics(b[0] / tf.cast(7 - i, b[0].dtype), "bad"), b[1]))
    model, chunks = fresh(jit_compile=False, steps_per_execution=10), Chunks()
    with pytest.raises(tf.errors.InvalidArgumentError, match="bad"):
        model.fit(batches.prefetch(0), verbose=0, callbacks=[chunks])
    assert chunks.lengths == [7] and chunks.records[0].rows[:, 0].tolist() == [4] * 7


def test_every_step_is_counted_once_across_kinds_of_feeds():
    x, y = data(10)
    for feeds in ({"x": x, "y": y, "batch_size": 4}, {"x": dataset(x, y, 4)}):
        chunks = Chunks()
        model = fresh(Counting, jit_compile=False)
        model.fit(**feeds, epochs=4, verbose=0, callbacks=[chunks])
        sizes = np.concatenate([r.rows[:, 0] for r in chunks.records])
        assert sizes.tolist() == [4, 4, 2] * 4
