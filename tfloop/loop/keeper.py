"""Keeper: a training step whose numbers are not finite leaves nothing behind.

The state is copied before each chunk. If a step of the chunk is not finite, every variable gets back what it held
then (weights, moments, BatchNorm statistics, `u`, seeds, counters and metrics), the steps before that one are made
again, to the same bits, and the chunk goes on behind it. Zeroing gradients would not do: moments, decay, statistics
and counters would move all the same. Taking steps back within the program would cost each of them a copy of the state.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from tfloop.loop.record import Record
from tfloop.operation import Operation


class Keeper:
    """Runs the chunks of a `Runner` and keeps what is finite.

    Args:
        variables: all that a step may change, `tf.Variable`s.
        halts: whether a chunk ends at the first step that is not finite.
    """

    def __init__(self, variables, halts):
        self._variables = list(variables)
        self._halts = halts
        copied = tf.function(lambda: [tf.identity(v) for v in self._variables], autograph=False)
        self._copied = Operation(copied.get_concrete_function())

    def run(self, runner, engine, kind, feed, first):
        """As `Runner.run`. The rows of steps that were taken back have their number of examples negative."""
        before = self._copied()
        record = runner.run(engine, kind, feed, first)
        if not is_bad(record).any():
            return record
        return self._keep(before, record, runner, engine, kind, feed, first)

    def _keep(self, before, record, runner, engine, kind, feed, first):
        rows, done, start = [], 0, first
        while (bad := np.flatnonzero(is_bad(record))).size:
            self._put_back(before)
            good = int(bad[0])
            if good:
                again = runner.run(engine, kind, part_of(feed, done, good), start)
                rows.append(again.rows)
            rows.append(record.rows[good : good + 1])
            done, start = done + good + 1, start + good
            if self._halts or done == feed.count:
                break
            before = self._copied()
            record = runner.run(engine, kind, part_of(feed, done, feed.count - done), start)
        else:
            rows.append(record.rows)
        found = np.concatenate(rows)
        return Record(record.layout, first, found, runner.results(kind, feed.spec), record.error)

    def _put_back(self, values):
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(value)


def is_bad(record):
    return record.rows[:, 0] < 0


def part_of(feed, start, count):
    """`count` batches of a feed from one on, in a feed of the same shape."""
    if start == 0:
        return dataclasses.replace(feed, count=count)
    if feed.kind == "rows":
        arrays, rows = feed.args
        return dataclasses.replace(feed, args=(arrays, np.roll(rows, -start, 0)), count=count)
    if feed.kind == "block":
        return dataclasses.replace(feed, args=[tf.roll(a, -start, 0) for a in feed.args], count=count)
    raise ValueError(f"A feed of kind {feed.kind!r} cannot be taken apart.")
