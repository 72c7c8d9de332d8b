"""`curves.png`: every metric over the steps, training and validation in one panel."""

import math
import os
import time
from pathlib import Path

import numpy as np
from absl import logging

from tfloop.runs import files
from tfloop.runs.writers import jsonl
from tfloop.runs.writers.writer import Writer

# Points kept of a curve: when there are twice as many, neighbours are averaged.
POINTS = 500
# Drawing takes some tenths of a second: at checkpoints at most this share of the time.
SHARE = 0.005


class Curve:
    """A curve of any length in bounded memory: neighbouring points are averaged as it grows."""

    def __init__(self):
        self.width = 1
        self.points = np.zeros((0, 2))  # (step, value), means over `width` points each
        self._pending = np.zeros((0, 2))

    def extend(self, steps, values):
        """Adds finite points."""
        waiting = np.concatenate([self._pending, np.stack([steps, values], axis=1)])
        whole = len(waiting) // self.width * self.width
        self._pending = waiting[whole:]
        means = waiting[:whole].reshape(-1, self.width, 2).mean(axis=1)
        self.points = np.concatenate([self.points, means])
        while len(self.points) >= 2 * POINTS:
            pairs = len(self.points) // 2 * 2
            halved = self.points[:pairs].reshape(-1, 2, 2).mean(axis=1)
            self.points = np.concatenate([halved, self.points[pairs:]])
            self.width *= 2


class Curves(Writer):
    """Draws what it was given into a PNG file, when closed and now and then at a flush.

    On a resume it reads what is in `log`, the run's `metrics.jsonl`. Without matplotlib there is no
    picture, said once.
    """

    def __init__(self, path, log, clock=time.monotonic):
        self.path = Path(path)
        self.log = log
        self._clock = clock
        self._curves: dict[tuple[str, str], Curve] = {}
        self._drawn_at = -math.inf
        self._cost = 0.0
        self._changed = False

    def rows(self, split, steps, epoch, names, values, present=None):
        values = np.asarray(values, np.float64)
        use = np.isfinite(values) if present is None else np.isfinite(values) & present
        for column, name in enumerate(names):
            rows = use[:, column]
            curve = self._curves.setdefault((split, name), Curve())
            curve.extend(steps[rows], values[rows, column])
        self._changed = True

    def resume(self, step, epoch):
        for row in jsonl.read(self.log):
            split, at = row.pop("split"), row.pop("step")
            row.pop("epoch")
            row.pop("nonfinite", None)
            for name, value in row.items():
                if value is not None:
                    self._curves.setdefault((split, name), Curve()).extend([at], [value])

    def flush(self):
        if self._clock() - self._drawn_at >= self._cost / SHARE:
            self._draw()

    def close(self):
        self._draw()

    def _draw(self):
        if not self._changed or math.isinf(self._cost):
            return
        start = self._clock()
        self._changed = False
        try:
            draw(self._curves, self.path)
        except ImportError:
            logging.warning("No %s: matplotlib is not installed (pip install matplotlib).", self.path.name)
            self._cost = math.inf
            return
        except OSError as error:
            logging.warning("%s cannot be written: %s", self.path, error)
        self._drawn_at = self._clock()
        self._cost = self._drawn_at - start


def draw(curves, path):
    """Draws `(split, name) -> Curve` into a PNG file; `val_loss` goes into the panel of `loss`."""
    from matplotlib.figure import Figure  # no pyplot: drawn on a thread, without a display

    panels: dict[str, list] = {}
    for (split, name), curve in curves.items():
        if len(curve.points):
            panels.setdefault(name.removeprefix("val_"), []).append((split, name, curve))
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for split, name, curve in lines:
            style = {"marker": ".", "linewidth": 1.5} if split == "epoch" else {"linewidth": 0.7, "alpha": 0.6}
            label = "validation" if name.startswith("val_") else split
            axis.plot(*curve.points.T, label=label, **style)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    aside = path.with_name(f".{path.name}.aside")
    figure.savefig(aside, format="png", dpi=100)
    os.replace(aside, path)
    files.flush_folder(path.parent)
