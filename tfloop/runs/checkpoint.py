"""Checkpoints: the saved states of a run, of which the newest whole one is always there.

A state is copied out, written aside on a thread, flushed and renamed into place; only then are older
ones deleted. Order is by step, never by time. What is damaged is skipped with a warning and kept.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from tfloop.runs import checkpoint_file, files
from tfloop.runs.checkpoint_file import Damaged
from tfloop.runs.errors import (
    CheckpointError,
    CheckpointMismatch,
    FolderError,
    NoUsableCheckpoint,
)

# A save that fails (disk full, an unwritable folder) is tried ATTEMPTS times, with pauses of
# PAUSE, 4 PAUSE, ... seconds; after GIVE_UP failed saves in a row training stops.
ATTEMPTS = 4
PAUSE = 0.1
GIVE_UP = 5

WRITING = ".writing-"
TRASH = ".trash-"
DAMAGED = "damaged"

# Tensors that are saved with a model's and are not compared with it.
NOT_THE_MODELS = ("metrics/", "process/", "loop/", "callbacks/")


class Restored(NamedTuple):
    """What a checkpoint held. `skipped`: how it differs from the model, with `partial=True`."""

    step: int
    tensors: dict
    manifest: dict
    metrics: dict
    path: Path
    skipped: list


class _Job(NamedTuple):
    """What one save writes."""

    step: int
    arrays: dict
    manifest: Callable[[], str]  # makes it, as JSON
    metrics: dict
    before_commit: Callable[[], None]


def nowhere(point):
    """The fault hook of ordinary use. A test raises or kills at the points it is told of."""


class Checkpoints:
    """The checkpoints in a folder: the last `keep`, and the best by a metric.

    `best`: `"val_loss"` (its minimum) or `("val_accuracy", "max")`. Only one process may save.

        checkpoints = Checkpoints(folder, keep=3, best="val_loss")
        checkpoints.save(step, tensors, {"epoch": 2}, metrics={"val_loss": 0.3})
        checkpoints.wait()
        restored = checkpoints.restore_latest(expect=variables)
    """

    def __init__(self, folder, keep=3, best=None, at=nowhere, sleep=time.sleep):
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, or None for all, got {keep}.")
        metric, mode = (best, "min") if isinstance(best, str) else best or (None, "min")
        if mode not in ("min", "max"):
            raise ValueError(f"best must be (metric, 'min' or 'max'), got {best!r}.")
        self.folder = Path(folder)
        self.keep = keep
        self.best = metric, mode
        self.saved_step: int | None = None  # of the last save that is on disk
        self._metrics: dict[str, dict] = {}  # of checkpoints, as written or read, by name
        self._at, self._sleep = at, sleep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._save: Future | None = None  # the one under way
        self._error: BaseException | None = None
        self._failures = 0

    # Saving

    @property
    def busy(self):
        """Whether a save is under way: another would have to wait for it."""
        return self._save is not None and not self._save.done()

    def save(
        self,
        step,
        tensors,
        manifest,
        metrics=None,
        *,
        before_commit: Callable[[], None] = lambda: None,
        wait=False,
        copy=True,
    ):
        """Saves named arrays and what JSON can hold, on a thread; first waits for the save before it.

        `copy=False`: arrays and manifest are the callee's, nobody changes them. `before_commit()` runs on the
        thread before the checkpoint becomes visible, to flush logs it must not be ahead of.
        Raises `CheckpointError` if the save before failed for a reason that will not pass, or
        `GIVE_UP` saves in a row failed; with `wait=True` also if this one does.
        """
        arrays = checkpoint_file.checked(tensors)
        if copy:
            arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
            text = files.to_json(manifest)  # an error here if it cannot be
        to_json = (lambda: text) if copy else functools.partial(files.to_json, manifest)
        job = _Job(int(step), arrays, to_json, dict(metrics or {}), before_commit)
        self._join()
        self._raise_unless_passing()
        self._save = self._thread.submit(self._run, job)
        if wait:
            self.wait()

    def wait(self):
        """Waits for the save under way; `CheckpointError` if the last one failed."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(f"The last checkpoint was not written: {error}") from error

    def _join(self):
        if self._save is not None:
            self._save.result()
            self._save = None

    def _raise_unless_passing(self):
        error, self._error = self._error, None
        if error is None:
            return
        if not isinstance(error, OSError):
            raise CheckpointError(f"The last checkpoint was not written: {error!r}") from error
        if self._failures >= GIVE_UP:
            raise CheckpointError(
                f"{self._failures} checkpoints in a row could not be written to {self.folder}: {error}"
            ) from error

    def _run(self, job):
        try:
            self._write_with_retries(job)
            self._failures = 0
        except BaseException as error:  # surfaces at the next save or wait
            self._error = error
            self._failures += 1
            logging.warning(
                "The checkpoint of step %d was not written (%d failed in a row; training stops at %d): %s",
                job.step,
                self._failures,
                GIVE_UP,
                error,
            )

    def _write_with_retries(self, job):
        for attempt in range(ATTEMPTS):
            try:
                self._write(job)
                return
            except OSError as error:
                self._clear(WRITING)
                if attempt == ATTEMPTS - 1:
                    raise
                logging.warning(
                    "Writing the checkpoint of step %d failed and is tried again; older checkpoints make room: %s",
                    job.step,
                    error,
                )
                self._prune(keep=1)
                self._sleep(PAUSE * 4**attempt)

    def _write(self, job):
        self._make_folder()
        self._clear(WRITING)
        name = self._new_name(job.step)
        aside = self.folder / (WRITING + name)
        aside.mkdir()
        self._at("begin")
        checkpoint_file.write(aside, job.step, job.arrays, job.manifest(), job.metrics, self._at)
        job.before_commit()
        os.rename(aside, self.folder / name)
        self._at("renamed")
        files.flush_folder(self.folder)
        self.saved_step, self._metrics[name] = job.step, job.metrics
        self._at("committed")
        self._prune(self.keep)
        self._at("pruned")

    def _new_name(self, step):
        places = [place for name in self._names() if (place := checkpoint_file.order(name))]
        rewrites = [rewrite for of, rewrite in places if of == step]
        return checkpoint_file.folder_name(step, max(rewrites) + 1 if rewrites else 0)

    def _make_folder(self):
        if files.exists(self.folder) and not files.is_folder(self.folder):
            raise FolderError(f"{self.folder} is a link or no folder; checkpoints are kept in a folder.")
        files.make_folder(self.folder)

    # Keeping

    def steps(self):
        """The steps of the checkpoints there are, whole or not, in order."""
        found = (checkpoint_file.order(name) for name in self._names())
        return sorted({place[0] for place in found if place})

    def _names(self):
        return sorted(os.listdir(self.folder)) if files.is_folder(self.folder) else []

    def would_be_best(self, metrics):
        """Whether a checkpoint with these metrics would be the best of those there are."""
        metric, mode = self.best
        score = metrics.get(metric)
        if score is None or not math.isfinite(score):
            return False
        others = []
        for name in self._names():
            if checkpoint_file.order(name):
                with contextlib.suppress(Damaged):
                    others.append(self._metrics_of(name).get(metric))
        others = [other for other in others if isinstance(other, int | float) and math.isfinite(other)]
        return all(score < other if mode == "min" else score > other for other in others)

    def _prune(self, keep):
        """Deletes what is neither among the last `keep` nor the best. Damaged ones are left alone."""
        metrics = {}
        for name in self._names():
            if checkpoint_file.order(name):
                try:
                    metrics[name] = self._metrics_of(name)
                except Damaged:
                    continue
        newest_first = sorted(metrics, key=checkpoint_file.order, reverse=True)
        last = list({checkpoint_file.order(name)[0]: name for name in reversed(newest_first)}.values())[::-1]
        retained = set(last if keep is None else last[:keep])
        metric, mode = self.best
        scores = {n: metrics[n].get(metric) for n in last}
        scores = {n: s for n, s in scores.items() if isinstance(s, int | float) and math.isfinite(s)}
        if scores:
            retained.add((min if mode == "min" else max)(scores, key=lambda name: scores[name]))
        for name in metrics:
            if name not in retained:
                try:
                    self._delete(name)
                except OSError as error:  # the new one is there all the same
                    logging.warning("%s cannot be deleted: %s", self.folder / name, error)

    def _metrics_of(self, name):
        """The metrics of a checkpoint. What others wrote is read, and `Damaged` if it cannot be."""
        if name not in self._metrics:
            self._metrics[name] = checkpoint_file.read_content(self.folder / name).metrics
        return self._metrics[name]

    def _delete(self, name):
        """Deletes a checkpoint's two files. A folder that holds anything else stays as it is."""
        path = self.folder / name
        if not set(os.listdir(path)) <= {checkpoint_file.TENSORS, checkpoint_file.MANIFEST}:
            logging.warning("%s is kept: it holds files that are not a checkpoint's.", path)
            return
        trash = self.folder / (TRASH + name)
        os.rename(path, trash)  # gone at once: a kill in between leaves no half checkpoint
        self._metrics.pop(name, None)
        self._remove(trash)

    def _clear(self, prefix):
        for name in self._names():
            if name.startswith(prefix):
                self._remove(self.folder / name)

    def _remove(self, path):
        """Removes a folder of ours with the two files it may hold; follows no link."""
        try:
            if files.is_folder(path):
                for name in (checkpoint_file.TENSORS, checkpoint_file.MANIFEST):
                    if files.exists(path / name):
                        os.unlink(path / name)
                os.rmdir(path)
                return
            logging.warning("%s is left as it is: it is no folder.", path)
        except OSError as error:
            logging.warning("%s cannot be removed: %s", path, error)

    def sweep(self):
        """Removes what a killed process left half written or half deleted."""
        self._clear(WRITING)
        self._clear(TRASH)

    def discard_after(self, step):
        """Deletes the checkpoints of later steps: what came after a step that was gone back to."""
        self._join()
        for name in self._names():
            place = checkpoint_file.order(name)
            if place and place[0] > step:
                self._delete(name)

    # Restoring

    def restore_latest(self, expect=None, partial=False, before=None):
        """The newest whole checkpoint as `Restored`, or `None` if there never was one.

        `before`: a step; only checkpoints of earlier steps count. `expect`: `name -> variable or
        array`, what the model has: `CheckpointMismatch` if names, shapes or dtypes differ, either
        way; with `partial=True` what fits is returned. Damaged checkpoints are skipped and moved to
        `damaged/`, if there is a whole one; if there is none, `NoUsableCheckpoint`, and all stays
        where it is.
        """
        self._join()
        tried: list[tuple[str, str]] = []
        for name in self._newest_first():
            place = checkpoint_file.order(name)
            if before is not None and place and place[0] >= before:
                continue
            try:
                restored = self._restore(name, expect, partial)
            except Damaged as error:
                tried.append((name, str(error)))
                logging.warning("Checkpoint %s is damaged and skipped: %s.", name, error)
                continue
            for bad, _ in tried:
                self._set_aside(bad)
            return restored
        tried += [(f"{DAMAGED}/{name}", "set aside earlier") for name in self._damaged()]
        if tried:
            listed = "\n".join(f"  {name}: {why}" for name, why in tried)
            raise NoUsableCheckpoint(
                f"There are checkpoints in {self.folder}, and none can be used:\n{listed}\n"
                "Nothing was changed. Mend one, or begin anew with --resume=restart."
            )
        return None

    def _newest_first(self):
        """Names of what is a checkpoint, or looks like one, newest first and strange ones last."""
        like = [name for name in self._names() if name.startswith("step-")]
        return sorted(like, key=lambda name: checkpoint_file.order(name) or (-1, 0), reverse=True)

    def _damaged(self):
        place = self.folder / DAMAGED
        return sorted(os.listdir(place)) if files.is_folder(place) else []

    def _restore(self, name, expect, partial):
        path = self.folder / name
        if checkpoint_file.order(name) is None:
            raise Damaged("this is not the name of a checkpoint")
        content = checkpoint_file.verify(path)
        names, lines = list(content.tensors), []
        if expect is not None:
            expected = {n: checkpoint_file.spec(v) for n, v in expect.items()}
            of_model = {n: s for n, s in content.tensors.items() if n in expected or not n.startswith(NOT_THE_MODELS)}
            lines = checkpoint_file.differences(of_model, expected)
            names = [n for n in names if n not in of_model or expected.get(n) == of_model[n]]
        if lines and not partial:
            raise CheckpointMismatch(
                f"Checkpoint {path} is of another model:\n" + _listed(lines) + "\n"
                "Use the model it was made with, or take what fits with --resume=partial."
            )
        if lines:
            logging.warning("Checkpoint %s is taken in part:\n%s", path, _listed(lines))
        tensors = checkpoint_file.read_tensors(path, content, names)
        return Restored(content.step, tensors, content.manifest, content.metrics, path, lines)

    def _set_aside(self, name):
        place = self.folder / DAMAGED
        if files.exists(place) and not files.is_folder(place):
            raise FolderError(f"{place} is a link or no folder; damaged checkpoints are kept there.")
        files.make_folder(place)
        os.rename(self.folder / name, files.free_name(place, name))
        files.flush_folder(self.folder)


class ReadOnly(Checkpoints):
    """The checkpoints of a run in which another process saves."""

    def save(self, *args, **kwargs):
        pass

    def sweep(self):
        pass

    def _set_aside(self, name):
        pass


def _listed(lines, limit=30):
    rest = len(lines) - limit
    return "\n".join(f"  {line}" for line in lines[:limit]) + (f"\n  and {rest} more" if rest > 0 else "")
