"""The guard: what is not finite, and what is out of proportion.

Whether a step is finite is decided in the step. Here is what is said about one that was not, and the
rule that tells a spike of the loss.
"""

import math
from collections import deque
from typing import NamedTuple

import numpy as np

# The factor that makes the median absolute deviation of normal numbers their standard deviation.
NORMAL = 1.4826
# Deviations below this share of the median are noise of the arithmetic, not of the data.
LEAST = 1e-3


class Report(NamedTuple):
    """The first tensor of a step with a value that is not finite."""

    name: str
    dtype: str
    shape: tuple
    nan: int
    positive: int
    negative: int
    at: tuple
    finite_before: str | None

    def __str__(self):
        kinds = {"NaN": self.nan, "inf": self.positive, "-inf": self.negative}
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        before = f"; {self.finite_before!r} before it is finite" if self.finite_before else ""
        size = math.prod(self.shape)
        return (
            f"{self.name!r} ({self.dtype}{list(self.shape)}) is the first tensor that is not finite: "
            f"{counts} of {size} values, the first at {list(self.at)}{before}."
        )


def first_nonfinite(tensors):
    """The `Report` of the first of named tensors, in their order, that is not finite; `None` if all are.

    `tensors`: a mapping or `(name, tensor)` pairs. What holds no floats is passed over.
    """
    last = None
    for name, tensor in tensors.items() if hasattr(tensors, "items") else tensors:
        array = np.asarray(tensor)
        if not _is_floating(array.dtype):
            continue
        if array.dtype.itemsize < 4:
            array = array.astype(np.float32)
        bad = ~np.isfinite(array)
        if bad.any():
            at = tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))
            return Report(
                name=name,
                dtype=str(np.asarray(tensor).dtype),
                shape=array.shape,
                nan=int(np.isnan(array).sum()),
                positive=int(np.isposinf(array.real).sum()),
                negative=int(np.isneginf(array.real).sum()),
                at=at,
                finite_before=last,
            )
        last = name
    return None


def _is_floating(dtype):
    return dtype.kind in "fc" or dtype.name.startswith(("bfloat", "float"))


def threshold(history, factor):
    """`median + factor * deviation` of finite numbers, robustly: half of them may be anything.

    The deviation is 1.4826 times the median absolute deviation (the standard deviation, for normal
    numbers), and at least a thousandth of the median.
    """
    values = np.asarray(history, np.float64)
    median = np.median(values)
    deviation = NORMAL * np.median(np.abs(values - median))
    return float(median + factor * max(deviation, LEAST * abs(median), np.finfo(np.float32).tiny))


class SpikeRule:
    """Tells the steps whose loss is out of proportion to the last `window` ones.

    A loss above `threshold(last ones, factor)` is a spike, once `warmup` losses are known. Spikes stay
    out of the window, but `patience` in a row are a new level, and begin it anew. What is not finite
    is no spike and changes nothing: that is the guard's case.
    """

    def __init__(self, factor=6.0, window=128, warmup=32, patience=8):
        if not 2 <= warmup <= window or factor <= 0 or patience < 1:
            raise ValueError(
                "SpikeRule needs factor > 0, 2 <= warmup <= window and patience >= 1, got "
                f"factor={factor}, warmup={warmup}, window={window}, patience={patience}."
            )
        self.factor, self.warmup, self.patience = factor, warmup, patience
        self._window: deque[float] = deque(maxlen=window)
        self._row: list[float] = []

    def update(self, loss):
        """Whether this loss is a spike."""
        loss = float(loss)
        if not math.isfinite(loss):
            return False
        known = len(self._window) >= self.warmup
        if not known or loss <= threshold(self._window, self.factor):
            self._window.append(loss)
            self._row.clear()
            return False
        self._row.append(loss)
        if len(self._row) < self.patience:
            return True
        self._window.clear()
        self._window.extend(self._row)
        self._row.clear()
        return False

    def get_state(self):
        """What a checkpoint keeps, as JSON holds it."""
        return {"window": list(self._window), "row": list(self._row)}

    def set_state(self, state):
        """Goes on from `get_state`'s value."""
        self._window = deque(state["window"], maxlen=self._window.maxlen)
        self._row = list(state["row"])


class Skipped:
    """The batches that a run leaves out, as ranges of batches of an epoch.

    Recorded in every checkpoint after it, so that a later resume leaves them out too.
    """

    def __init__(self, ranges=()):
        self.ranges = [(int(e), int(start), int(stop)) for e, start, stop in ranges]

    def add(self, epoch, start, stop):
        """Leaves out batches `start` .. `stop - 1` of an epoch."""
        if stop <= start:
            raise ValueError(f"A range of batches has start < stop, got {start}, {stop}.")
        merged = []
        for other in self.ranges:
            if other[0] == epoch and other[1] <= stop and start <= other[2]:
                start, stop = min(start, other[1]), max(stop, other[2])
            else:
                merged.append(other)
        self.ranges = sorted([*merged, (epoch, start, stop)])

    def __contains__(self, batch):
        epoch, index = batch
        return any(e == epoch and start <= index < stop for e, start, stop in self.ranges)

    def get_state(self):
        """What a checkpoint keeps, as JSON holds it."""
        return [list(r) for r in self.ranges]
