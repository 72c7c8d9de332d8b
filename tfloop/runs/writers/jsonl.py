"""`metrics.jsonl`: a line of strict JSON a row.

    {"split": "train", "step": 12, "epoch": 0, "loss": 0.693147182}
    {"split": "train", "step": 13, "epoch": 0, "loss": null, "nonfinite": ["loss"]}

Numbers have the 9 (float32) or 17 (float64) digits that keep every bit. A block of rows is one
template filled with numbers: 20 scalars cost some 6 us a row, against some 20 for `json.dumps`.
"""

import functools
import json

import numpy as np

from tfloop.runs import files
from tfloop.runs.writers.append_file import AppendFile, cut_after
from tfloop.runs.writers.writer import Writer

FIELDS = frozenset(("split", "step", "epoch", "nonfinite"))


class JSONL(Writer):
    """Rows as lines of JSON."""

    def __init__(self, path):
        self.path = path
        self._file: AppendFile | None = None

    def rows(self, split, steps, epoch, names, values, present=None):
        if self._file is None:
            self._file = AppendFile(self.path)
        self._file.append(lines(split, steps, epoch, names, values, present).encode())

    def resume(self, step, epoch):
        cut_after(self.path, lambda line: _is_before(line, step, epoch))

    def flush(self):
        if self._file is not None:
            self._file.flush()

    def close(self):
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def lines(split, steps, epoch, names, values, present=None):
    """The text of a block of rows."""
    names = [f"metrics/{name}" if name in FIELDS else name for name in names]
    values = np.asarray(values)
    if values.dtype.kind != "f" or values.dtype.itemsize < 4:
        values = values.astype(np.float64 if values.dtype.kind in "iu" else np.float32)
    digits = 9 if values.dtype == np.float32 else 17
    template = _template(split, int(epoch), tuple(names), digits)
    numbers = values.tolist()
    text = [template % (step, *row) for step, row in zip(steps.tolist(), numbers, strict=True)]
    strange = ~np.isfinite(values) if present is None else ~np.isfinite(values) | ~present
    for index in np.flatnonzero(strange.any(axis=1)).tolist():
        shown = np.ones(len(names), bool) if present is None else present[index]
        text[index] = _line(split, int(steps[index]), int(epoch), names, numbers[index], shown)
    return "".join(text)


@functools.lru_cache(maxsize=64)
def _template(split, epoch, names, digits):
    head = json.dumps({"split": split, "step": 0, "epoch": epoch}).replace("%", "%%")
    head = head.replace('"step": 0', '"step": %d').removesuffix("}")
    keys = [json.dumps(name).replace("%", "%%") for name in names]
    return head + "".join(f", {key}: %.{digits}g" for key in keys) + "}\n"


def _line(split, step, epoch, names, numbers, shown):
    """A row with values that are not finite (`null`, and listed), or not there (left out)."""
    row = {"split": split, "step": step, "epoch": epoch}
    there = {name: number for name, number, is_there in zip(names, numbers, shown, strict=True) if is_there}
    bad = [name for name, number in there.items() if number - number != 0.0]
    row |= {name: None if name in bad else number for name, number in there.items()}
    return json.dumps(row | ({"nonfinite": bad} if bad else {}), allow_nan=False) + "\n"


def _is_before(line, step, epoch):
    row = _parsed(line)
    if row is None or row["step"] > step:
        return False
    return row["split"] != "epoch" or row["epoch"] < epoch


def _parsed(line):
    """The row of a line, or `None` if it is not one."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"] + row["epoch"], int) and row["split"] else None
    except (ValueError, TypeError, KeyError):
        return None


def read(path):
    """The rows of a `metrics.jsonl`, one after the other. A half-written last line is left out."""
    try:
        with files.open_regular(path) as file:
            for line in file:
                row = _parsed(line) if line.endswith(b"\n") else None
                if row is not None:
                    yield row
    except FileNotFoundError:
        return
