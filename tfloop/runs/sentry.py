"""The sentry: what follows from steps that were taken back because they were not finite, and from spikes.

`skip` goes on with the next batch; `stop` and `rollback` find the first bad tensor first, by running the step
again, eagerly and outside XLA, on the state that it found.
"""

import functools
import itertools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfloop import names, replicas, reproducibility
from tfloop.loop.feed import batch_of, packed
from tfloop.loop.record import Record
from tfloop.model_step import ModelStep
from tfloop.runs import guard
from tfloop.step import running

MOST_IN_A_ROW = 20  # steps that are skipped one after the other; then the run stops
MOST_ROLLBACKS = 10  # of one process; then the run stops
FOLDER = "nonfinite"


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite, or the loss spiked, and the run stopped before that step."""


class RolledBack(Exception):
    """Ends a fit that goes on from the last checkpoint, without the batches in `skipped`."""

    def __init__(self, skipped):
        super().__init__("going back to the last checkpoint")
        self.skipped = skipped


class Where(NamedTuple):
    """A batch, and the step that it would have been."""

    step: int
    epoch: int
    batch: int


class Sentry:
    """Looks at the records of a run. `look` gives what is to be kept of one; `act` raises what follows."""

    def __init__(self, model, variables, source, on_nan, spike, skipped, folder):
        self._model, self._variables, self._source = model, variables, source
        self._on_nan, self._spike, self._folder = on_nan, spike, folder
        self.skipped = skipped  # batches that are left out, `guard.Skipped`
        self.count = 0  # steps that were taken back and skipped
        self._in_a_row = 0
        self._after = None  # what `act` does

    def look(self, record, feed, position):
        """The record without the rows that were taken back. `position` is behind all of them."""
        start = position.batch - len(record)
        back = record.rows[:, 0] < 0
        if back.any():
            record = self._taken_back(record, back, feed, start, position)
        elif len(record):
            self._in_a_row = 0
        return self._without_spikes(record, start, position) if self._spike else record

    def _taken_back(self, record, back, feed, start, position):
        bad = int(np.argmax(back))
        for index in np.flatnonzero(back) if self._on_nan == "skip" else [bad]:
            kept = int((~back[:index]).sum())
            where = Where(record.first + kept + 1, position.epoch, start + int(index))
            self._in_a_row = self._in_a_row + 1 if index == 0 or back[index - 1] else 1
            if self._on_nan == "skip":
                self.count += 1
                logging.warning("%s was not finite and was skipped: nothing moved.", told(where))
        if not back[-1]:
            self._in_a_row = 0
        if self._on_nan == "skip" and self._in_a_row < MOST_IN_A_ROW:
            return rows_of(record, ~back)
        if self._on_nan != "skip":
            position.batch = where.batch  # none of the later steps was made
        self._after = functools.partial(self._end, where, self._batch(feed, int(index)))
        return rows_of(record, ~back) if self._on_nan == "skip" else rows_of(record, slice(0, bad))

    def _without_spikes(self, record, start, position):
        """The record up to the first spike of the loss, which ends the fit if there is one."""
        names, values, _ = record.scalars() if len(record) else ([], None, None)
        if "loss" not in names:
            return record
        for index, loss in enumerate(values[:, names.index("loss")]):
            if self._spike.update(loss):
                where = Where(record.first + index + 1, position.epoch, start + index)
                text = f"The loss of {told(where)} spiked: {loss:.4g}."
                self._after = functools.partial(self._roll_back, where, text)
                return record
        return record

    def act(self):
        """Raises what follows from the last record, when it has been counted."""
        after, self._after = self._after, None
        if after is not None:
            after()

    def _end(self, where, batch):
        text = self._report(where, batch)
        if self._on_nan == "rollback":
            self._roll_back(where, text)
        if self._on_nan == "skip":
            text = f"{MOST_IN_A_ROW} steps in a row were not finite. {text}"
        raise NonFiniteError(text)

    def _roll_back(self, where, text):
        logging.warning("%s Going back to the last checkpoint; batch %d of epoch %d is left out.", text, *where[:0:-1])
        self.skipped.add(where.epoch, where.batch, where.batch + 1)
        raise RolledBack(self.skipped)

    # What is said.

    def _report(self, where, batch):
        found = None
        if batch is not None:
            try:
                found = guard.first_nonfinite(replayed(self._model, batch, self._variables))
            except Exception as error:
                found = f"Running the step again failed: {error!r}"
        place = self._save(where, batch, found)
        first = found or "Run again outside XLA all of its tensors were finite."
        return f"{told(where)} is not finite. {first} The batch is in {place}."

    def _save(self, where, batch, found):
        """Saves the batch, its indices and the report; `where` they are."""
        arrays = {} if batch is None else named_arrays(batch)
        indices = self._indices(where)
        if indices is not None:
            arrays["indices"] = indices
        name = f"{FOLDER}/step-{where.step:010d}"
        try:
            self._folder.make_folder(FOLDER)
            with open(self._folder.path(f"{name}.npz"), "wb") as file:
                np.savez(file, **arrays)
            report = found._asdict() if isinstance(found, guard.Report) else {"text": found}
            told = {**where._asdict(), "indices": None if indices is None else indices.tolist(), "report": report}
            self._folder.write_json(f"{name}.json", told)
        except OSError as error:
            logging.warning("The batch of step %d cannot be saved: %s", where.step, error)
        return self._folder.folder / f"{name}.npz"

    def _indices(self, where):
        """The indices of the batch's examples, where the source knows them."""
        indices = getattr(self._source, "indices", None)
        return None if indices is None else np.asarray(indices(where.epoch, where.batch))

    def _batch(self, feed, index):
        """The batch again; `None` if its source cannot give it a second time."""
        if feed.kind == "iterator":
            return None
        return packed(feed.spec, [tf.convert_to_tensor(t) for t in batch_of(feed.kind, feed.args, index)])

    def get_state(self):
        """What a checkpoint keeps."""
        spike = self._spike.get_state() if self._spike else None
        return {"skipped": self.skipped.get_state(), "count": self.count, "spike": spike}

    def set_state(self, state):
        for epoch, start, stop in state["skipped"]:
            self.skipped.add(epoch, start, stop)
        self.count = state["count"]
        if self._spike and state["spike"]:
            self._spike.set_state(state["spike"])


def told(where):
    return f"Step {where.step} (batch {where.batch} of epoch {where.epoch})"


def rows_of(record, kept):
    """A record of some of the rows of another."""
    return Record(record.layout, record.first, record.rows[kept], record.results, record.error)


def replayed(model, batch, variables):
    """`(name, tensor)` of everything in a training step, in the order in which it is computed.

    The step is run eagerly, and every variable gets back what it held.
    """
    before = reproducibility.snapshot(variables)
    weights = [(f"weights/{name}", keras.ops.convert_to_numpy(v)) for name, v in names.weight_names(model).items()]
    updates = tf.convert_to_tensor(model.extra_state()["updates"])
    found = []  # of each replica

    def run(replica):
        part = replica.part(batch)
        step = ModelStep(model, "train", part.data, updates, part=part if part.replicated else None)
        with running(step), step.hearing():
            model.train_step(part.data)
        found.append(in_order(step.metric_tensors()))

    try:
        strategy = replicas.strategy_of(model)
        if strategy is None:
            run(replicas.Replica())
        else:
            replicas.on_each_replica(strategy, run)
        return [*weights, *itertools.chain(*zip(*found, strict=True))]
    finally:
        reproducibility.assign(variables, before)


def in_order(found):
    """`(name, tensor)` of a step's tensors, in the order in which they are computed; the weights are left out."""
    groups = {group: [n for n in found if n.startswith(group)] for group in ("losses/", "gradients/", "updates/")}
    groups["gradients/"].reverse()  # they come from behind
    later = [name for group in groups.values() for name in group]
    forward = [name for name in found if name not in later and not name.startswith("weights/")]
    return [(name, found[name]) for name in (*forward, *later)]


def named_arrays(batch):
    """The tensors of a batch as arrays, by their names."""
    return {name: np.asarray(leaf) for name, leaf in leaves(batch)}


def leaves(batch):
    """`(name, tensor)` of a batch: `x`, `y`, `sample_weight`, nested ones as `x/0`, `x/image`."""
    parts = zip(("x", "y", "sample_weight"), keras.utils.unpack_x_y_sample_weight(batch), strict=True)
    for name, part in parts:
        for path, leaf in keras.tree.flatten_with_path(part):
            if leaf is not None:
                yield "/".join([name, *map(str, path)]), leaf
