"""A session: one process's part in a run. It accompanies `fit`, logs what the loop records, saves and resumes.

What is done is done at `after_chunk`: the position, the rows written and the state of the variables belong
together there, and nowhere else.
"""

import sys
import time

import numpy as np
from absl import logging

from tfloop import reproducibility, statistics
from tfloop.loop.observer import Observer, Position
from tfloop.runs import callback_state, config, environment, workdir
from tfloop.runs.errors import CheckpointError, ConfigError
from tfloop.runs.writers import CSV, JSONL, Composite, Curves, TensorBoard, Threaded


class Session(Observer):
    """The observer of one `fit` of a run."""

    def __init__(self, run, place, checkpoints, stop, arguments):
        super().__init__()
        self._run, self._place, self._checkpoints, self._stop = run, place, checkpoints, stop
        self._arguments = arguments
        self._restored = None
        self._writer = None
        self._loop = None
        self._read = None
        self._saved = None  # where the last save was made
        self._logs = None  # of the last epoch
        self._consistent = False  # whether variables, position and rows belong together now
        self._saved_at = time.monotonic()
        self._began = time.monotonic()
        self._seconds_before = 0.0
        self.updates = 0
        self.was_finished = False

    # Beginning.

    def on_built(self, loop, source, callbacks):
        self._loop = loop
        self._others = [c for c in callbacks if c is not self]
        self._variables = {
            **reproducibility.state_variables(self.model),
            **reproducibility.metric_variables(self.model),
        }
        self._read = reproducibility.Reader(self._variables)
        self._before = self._place.read_json(workdir.CONFIG)
        self._now = self._configuration(source)
        if self._before is not None:
            self._compare(self._before, self._now)
        self._restored = self._checkpoints.restore_latest(self._variables, partial=self._run.resume == "partial")

    def _configuration(self, source):
        data = {"examples": getattr(source, "examples", None), "steps_per_epoch": source.steps}
        return {"flags": self._flags(), "seed": self._run.seed, "data": data, **environment.describe()}

    def _flags(self):
        run = self._run
        told = {"workdir": str(run.folder), "seed": run.seed, "checkpoint_every": str(run.every), "keep": run.keep}
        told |= {"resume": run.resume, "on_nan": run.on_nan, "log": ",".join(run.log)}
        simple = {k: v for k, v in self._arguments.items() if v is None or isinstance(v, bool | int | float | str)}
        simple.pop("verbose", None)
        return {**told, **simple, **run.settings}

    def _compare(self, before, now):
        changes = config.changes(before, now)
        if changes.refused:
            listed = "\n".join(f"  {line}" for line in changes.refused)
            raise ConfigError(
                f"{self._run.folder} holds a run that was made otherwise:\n{listed}\n"
                "Give the same values, another --workdir, or --resume=restart to begin anew."
            )
        for line in changes.warned:
            logging.warning("The bits of this run may differ from an uninterrupted one: %s", line)

    def start(self, position):
        if self._restored is not None:
            position = self._resume()
        self.updates = self._count()
        if self._before is None:
            self._place.write_json(workdir.CONFIG, {**self._now, "engine": self._loop.engine})
        self._open_writers()
        if self._before is not None:
            self._writer.resume(self.updates, position.epoch)
        self._consistent = True
        return position

    def _resume(self):
        manifest = self._restored.manifest
        self._restore()
        self._seconds_before = manifest["seconds"]
        position = Position(manifest["epoch"], manifest["batch"])
        position.aggregate.set_state(manifest["aggregate"])
        self.model.stop_training = manifest["stop_training"]
        self.was_finished = self.model.stop_training or position.epoch >= self._arguments["epochs"]
        where = "is finished" if self.was_finished else f"goes on in epoch {position.epoch + 1}"
        print(f"{self._run.folder} {where}: {self._count()} steps are done.", file=sys.stderr, flush=True)
        return position

    def enter(self, position):
        if position.batch:  # what the beginning of the epoch did to the state was done before
            self._restore()

    def _restore(self):
        manifest, tensors = self._restored.manifest, self._restored.tensors
        process = reproducibility.process_variables(create=any(n.startswith("process/") for n in tensors))
        reproducibility.assign({**self._variables, **process}, tensors)
        reproducibility.set_random_state(manifest["random"])
        anew = callback_state.set_states(self._others, manifest["callbacks"], tensors)
        if anew:
            logging.warning("These callbacks have no get_state/set_state and begin anew: %s", ", ".join(anew))

    def _count(self):
        return int(self.model.extra_state()["updates"].numpy())

    def _open_writers(self):
        log = self._place.path(workdir.METRICS)
        writers = [JSONL(log), Curves(self._place.path("curves.png"), log)]
        if "tensorboard" in self._run.log:
            writers.append(TensorBoard(self._place.make_folder("tensorboard")))
        if "csv" in self._run.log:
            writers.append(CSV(self._place.make_folder("csv")))
        self._writer = Threaded(Composite(writers))

    # Between chunks.

    def limit(self, steps):
        if self._run.every.steps is not None:
            steps = min(steps, self._run.every.steps - self.updates % self._run.every.steps)
        return steps

    def on_chunk(self, record):
        self._consistent = False
        names, values, due = record.scalars()
        steps = record.first + 1 + np.arange(len(record))
        values = values.astype(record.rows.dtype)
        self._writer.rows("train", steps, self._loop.position.epoch, names, values, due)
        for name, index, counts in record.histograms():
            self._writer.histogram(name, index + 1, EDGES, counts)
        self.updates = record.first + len(record)
        self._consistent = True
        return record

    def after_chunk(self):
        if self._stop.signal is not None:
            self._stop.end()
        every = self._run.every
        if every.steps is not None and self.updates % every.steps == 0:
            self.save()
        elif every.seconds is not None and time.monotonic() - self._saved_at >= every.seconds:
            if not self._checkpoints.busy:
                self.save()

    def on_epoch(self, epoch, logs):
        self._consistent = True
        self._writer.scalars("epoch", self.updates, epoch, logs)
        self._logs = logs
        if self._run.every == (None, None):
            self.save(metrics=logs)
        if self._stop.signal is not None:
            self._stop.end()

    # Saving.

    def save(self, metrics=None, wait=False):
        """Saves the state as it is now, on a thread."""
        position = self._loop.position
        states, tensors = callback_state.get_states(self._others)
        process = reproducibility.snapshot(reproducibility.process_variables())
        manifest = {
            "epoch": position.epoch,
            "batch": position.batch,
            "aggregate": position.aggregate.get_state(),
            "stop_training": bool(self.model.stop_training),
            "callbacks": states,
            "random": reproducibility.random_state(),
            "seconds": self._seconds(),
        }
        arrays = {**self._read(), **process, **tensors}
        scores = {n: float(v) for n, v in (metrics or {}).items() if isinstance(v, int | float)}
        flush = self._writer.flush
        self._checkpoints.save(self.updates, arrays, manifest, scores, before_commit=flush, wait=wait, copy=False)
        self._saved_at, self._saved = time.monotonic(), self._here()

    def _here(self):
        return self.updates, self._loop.position.epoch, self._loop.position.batch

    def _seconds(self):
        return self._seconds_before + time.monotonic() - self._began

    # Ending.

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self._writer is None:  # nothing was begun
            return
        try:
            if self._consistent:
                self._save_at_the_end(error)
            if error is None:
                self._summarize()
        finally:
            self._writer.close()

    def _save_at_the_end(self, error):
        try:
            self._wait()
            if self._saved != self._here() and not self.was_finished:
                self.save(metrics=self._logs, wait=True)
        except CheckpointError as failure:
            if error is None:
                raise
            logging.error("%s", failure)

    def _wait(self):
        """Waits for the save under way; one that failed is made anew."""
        try:
            self._checkpoints.wait()
        except CheckpointError as failure:
            logging.warning("%s", failure)
            self._saved = None

    def _summarize(self):
        if self.was_finished and self._place.read_json(workdir.SUMMARY) is not None:
            return
        logs = self._last_logs()
        summary = {
            "metrics": logs,
            "steps": self.updates,
            "epochs": self._loop.position.epoch,
            "seconds": self._seconds(),
            "engine": self._loop.engine,
            "fingerprint": reproducibility.fingerprint(self.model),
        }
        self._place.write_json(workdir.SUMMARY, summary)

    def _last_logs(self):
        history = self.model.history.history if self.model.history else {}
        return {name: values[-1] for name, values in history.items() if values}


# The open ends of a histogram get an end, so that TensorBoard can draw them.
_ENDS = statistics.HISTOGRAM_EDGES[[0, -1]].astype(np.float64) * 10
EDGES = np.concatenate([_ENDS[:1], statistics.HISTOGRAM_EDGES, _ENDS[1:]])
