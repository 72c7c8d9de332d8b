"""`train.csv`, `epoch.csv`: a table for each split. A column that appears later widens the table."""

import csv
import io
import os

import numpy as np

from tfloop.runs import files
from tfloop.runs.writers.append_file import AppendFile, cut_after
from tfloop.runs.writers.writer import Writer

FIRST = ("step", "epoch")


class CSV(Writer):
    """Rows as tables in a folder, `<split>.csv`."""

    def __init__(self, folder):
        self.folder = folder
        self._tables: dict[str, _Table] = {}

    def rows(self, split, steps, epoch, names, values, present=None):
        if split not in self._tables:
            self._tables[split] = _Table(self.folder / f"{split}.csv")
        self._tables[split].append(steps, epoch, names, values, present)

    def resume(self, step, epoch):
        for name in os.listdir(self.folder):
            if name.endswith(".csv") and (self.folder / name).is_file():
                latest = epoch - 1 if name == "epoch.csv" else epoch
                cut_after(self.folder / name, lambda line, latest=latest: _is_before(line, step, latest))

    def flush(self):
        for table in self._tables.values():
            table.file.flush()

    def close(self):
        for table in self._tables.values():
            table.file.close()
        self._tables = {}


class _Table:
    def __init__(self, path):
        self.path = path
        self.columns = _header(path)
        self.file = AppendFile(path)
        if not self.columns:
            self.columns = list(FIRST)

    def append(self, steps, epoch, names, values, present):
        if new := [name for name in names if name not in self.columns]:
            self._widen(new)
        values = np.asarray(values, np.float64 if np.asarray(values).dtype.itemsize > 4 else np.float32)
        number = "%.9g" if values.dtype == np.float32 else "%.17g"
        place = {name: index for index, name in enumerate(names)}
        filled = [column for column in self.columns[2:] if column in place]
        template = ",".join(["%d", "%d", *(number if c in place else "" for c in self.columns[2:])]) + "\n"
        ordered = values[:, [place[column] for column in filled]]
        text = "".join(
            template % (step, epoch, *row) for step, row in zip(steps.tolist(), ordered.tolist(), strict=True)
        )
        if present is not None and not np.all(present):
            text = self._with_gaps(text, names, present)
        self.file.append(text.encode())

    def _with_gaps(self, text, names, present):
        rows = [line.split(",") for line in text.splitlines()]
        for i, j in zip(*np.nonzero(~np.asarray(present)), strict=True):
            rows[i][self.columns.index(names[j])] = ""
        return "".join(",".join(row) + "\n" for row in rows)

    def _widen(self, new):
        """Rewrites the table with more columns, whole or not at all."""
        self.file.close()
        columns = [*self.columns, *new]
        old = self.path.read_text().split("\n", 1)[1:] if os.path.getsize(self.path) else [""]
        gaps = "," * len(new)
        rows = "".join(line + gaps + "\n" for line in old[0].splitlines())
        files.write_whole(self.path, (_csv(columns) + rows).encode())
        self.columns = columns
        self.file = AppendFile(self.path)


def _csv(row):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()


def _header(path):
    """The columns of a table; none if there is no table yet. A name holds no line break."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])
    except FileNotFoundError:
        return []


def _is_before(line, step, latest_epoch):
    first, _, rest = line.partition(b",")
    second = rest.partition(b",")[0]
    if first == b"step":
        return True  # the header
    try:
        return int(first) <= step and int(second) <= latest_epoch
    except ValueError:
        return False
