"""Record: what a chunk of steps returns, one row a step, one column a scalar, as one array.

A `Layout` says what the columns are; it is known when the step is traced. An `Aggregate` turns rows into
the values of an epoch. Column 0 of every row is the number of examples in the batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Column:
    """One scalar of a step (`width` 1), or counts that stand side by side.

    `aggregation` makes the epoch's value of the steps': `mean` weighs by the batch's number of examples. Two kinds
    stand beside a metric object: `running` is its result as of that step, which is no value of the step's own, and
    `step` is what it measured in that step alone, of which no epoch's value is made. A `count`, named `count_of` a
    column, is 0 where that one has no value: it is one of no elements.
    The value is computed in steps 0, every, 2 * every, ... and means nothing in the others.
    """

    name: str
    aggregation: str = "mean"
    every: int = 1
    width: int = 1


@dataclasses.dataclass(frozen=True)
class Result:
    """A value that is read once a chunk and not once a step: the result of a stateful metric object.

    Where `count` reads 0 there is none: the metric was never updated.
    """

    name: str
    read: Callable[[], Any]
    count: Callable[[], Any] | None = None


def count_of(name):
    """The name of what says how many values a column or a result has seen."""
    return f"{name} (count)"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a step's row holds, and `order`: the names of columns and results as they are shown."""

    columns: tuple[Column, ...]
    results: tuple[Result, ...]
    order: tuple[str, ...]
    notes: tuple[str, ...] = ()  # why XLA cannot compile the step

    @property
    def width(self):
        return 1 + sum(c.width for c in self.columns)

    def slices(self):
        """`(column, slice of the row)` for each column."""
        start = 1
        for column in self.columns:
            yield column, slice(start, start + column.width)
            start += column.width


@dataclasses.dataclass
class Record:
    """Rows of `k` steps: `rows[i]` is that of the step with index `first + i`; `results` as of the last."""

    layout: Layout
    first: int  # updates completed before the first row's step
    rows: np.ndarray
    results: dict[str, float]
    error: Exception | None = None  # what ended the chunk early, to be raised when these steps have been seen

    def __len__(self):
        return len(self.rows)

    @property
    def examples(self):
        return int(self.rows[:, 0].sum())

    def scalars(self):
        """The names of what each step measured, the values as an array `(k, names)`, and which of them were due."""
        scalars = [(c, s.start) for c, s in self.layout.slices() if c.width == 1]
        picked = [(c, i) for c, i in scalars if c.aggregation not in ("running", "count")]
        values = self.rows[:, [i for _, i in picked]].astype(np.float64)
        due = np.arange(self.first, self.first + len(self))[:, None] % [c.every for c, _ in picked] == 0
        counts = {c.name: self.rows[:, i] for c, i in scalars if c.aggregation == "count"}
        for i, (column, _) in enumerate(picked if counts else ()):
            due[:, i] &= counts.get(count_of(column.name), 1) != 0
        return [c.name for c, _ in picked], values, due

    def histograms(self):
        """`(name, step index, counts)` of the last step in which each histogram was due."""
        for column, place in self.layout.slices():
            if column.width > 1:
                due = [i for i in range(len(self)) if (self.first + i) % column.every == 0]
                if due:
                    yield column.name, self.first + due[-1], self.rows[due[-1], place]


class Aggregate:
    """The values of an epoch (or of an evaluation) as of the rows seen so far."""

    def __init__(self):
        self._state = {}  # name -> (aggregation, weighted sum or value, weight)
        self._results = {}
        self._order = []
        self.steps = 0
        self.examples = 0

    def add(self, record: Record):
        if not len(record):
            return
        sizes = record.rows[:, 0].astype(np.float64)
        index = np.arange(record.first, record.first + len(record))
        counts = {c.name: record.rows[:, s.start] for c, s in record.layout.slices() if c.aggregation == "count"}
        for column, place in record.layout.slices():
            if column.width == 1 and column.aggregation not in ("step", "count"):
                due = (index % column.every == 0) & (counts.get(count_of(column.name), 1) != 0)
                if due.any():
                    self._fold(column, record.rows[due, place.start].astype(np.float64), sizes[due])
        self._results.update(record.results)
        self.steps += len(record)
        self.examples += record.examples
        if record.layout.order != tuple(self._order):
            self._order += [n for n in record.layout.order if n not in self._order]

    def _fold(self, column, values, sizes):
        _, value, weight = self._state.get(column.name, (None, None, 0.0))
        if column.aggregation == "mean":
            value = (value or 0.0) + float(np.dot(values, sizes))
            weight += float(sizes.sum())
        elif column.aggregation == "sum":
            value = (value or 0.0) + float(values.sum())
        elif column.aggregation in ("last", "running"):
            value = float(values[-1])
        else:
            reduce = {"min": np.min, "max": np.max}[column.aggregation]
            value = float(reduce(values if value is None else np.append(values, value)))
        self._state[column.name] = (column.aggregation, value, weight)

    def values(self) -> dict[str, float]:
        """The value of every name seen so far, in the order in which they are shown."""
        found = {}
        for name in self._order:
            if name in self._state:
                kind, value, weight = self._state[name]
                found[name] = value / weight if kind == "mean" and weight else value
            elif name in self._results and self._results.get(count_of(name), 1) != 0:
                found[name] = self._results[name]
        return found

    def get_state(self):
        """What it takes to go on later from here, as plain data."""
        return {
            "state": {k: list(v) for k, v in self._state.items()},
            "results": dict(self._results),
            "order": list(self._order),
            "steps": self.steps,
            "examples": self.examples,
        }

    def set_state(self, state):
        self._state = {k: tuple(v) for k, v in state["state"].items()}
        self._results = dict(state["results"])
        self._order = list(state["order"])
        self.steps, self.examples = state["steps"], state["examples"]
