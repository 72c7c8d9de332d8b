"""A session: one process's part in a run. It accompanies `fit`, logs what the loop records, saves and resumes.

Where several processes train together each has a session, and they agree between chunks. The chief's is that of the
run; the others write their logs aside (see `Aside`), read its checkpoints, and save none.

Variables, position and rows belong together after a chunk, and not while one runs, nor while callbacks see an epoch
begin or end, some of them before others: what ends a fit there (an error in the step or in a callback) leaves an
earlier state to be saved, kept in memory for that.
"""

import contextlib
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfloop import replicas, reproducibility, statistics
from tfloop.loop import tuner
from tfloop.loop.observer import Observer, Position
from tfloop.runs import callback_state, config, environment, files, guard, workdir
from tfloop.runs.errors import CheckpointError, ConfigError, Refused
from tfloop.runs.profile import Profile
from tfloop.runs.sentry import RolledBack, Sentry
from tfloop.runs.watchdog import Watchdog
from tfloop.runs.writers import CSV, JSONL, Composite, Curves, TensorBoard, Threaded

# Of the time, what copies of the state for the case of an error may take.
SHARE_OF_COPIES = 0.01


class Session(Observer):
    """The observer of one `fit` of a run.

    `arguments`: of the fit; `skipped`: the batches that are left out after a rollback.
    """

    def __init__(self, run, place, checkpoints, stop, arguments, skipped=()):
        super().__init__()
        self._run, self._place, self._checkpoints, self._stop = run, place, checkpoints, stop
        self._team = run.team
        self._arguments = arguments
        self._skipped = guard.Skipped(skipped)
        self._writer = None  # there from the start of the training on
        self._moving = False  # whether something runs that is not to be saved half done
        self._copy = None  # of the state, for an error in a chunk: see `_State`
        self._copied_at, self._copy_seconds = 0.0, 0.0
        self._saved = None  # where the last save was made
        self._owed = False  # whether one is due
        self._drew = True  # whether reading the data draws from the global random numbers: see `on_place`
        self._saved_at = self._began = time.monotonic()
        self._seconds_before = 0.0
        self._profile = Profile(run.profile)
        self._watchdog = Watchdog()
        self._logs = None  # of the last epoch
        self.updates = 0
        self.was_finished = False

    # Beginning.

    def on_built(self, loop, source, callbacks):
        self._loop, self._source = loop, source
        if self._run.on_nan == "rollback" and not source.rereadable:
            raise Refused(
                "on_nan='rollback' reads data again, and a generator, or a dataset that shuffles anew, gives others. "
                "Give arrays or a dataset in a fixed order (shuffle(..., reshuffle_each_iteration=False)), or "
                "on_nan='skip'."
            )
        loop.measure_each_step()
        if self._run.on_nan != "ignore":
            loop.guard()
        self._others = [c for c in callbacks if c is not self]
        self._others_act = any(not isinstance(c, keras.callbacks.History) for c in self._others)
        model, run = self.model, self._run
        self._before = workdir.read_json(self._run.shared, workdir.CONFIG)
        self._now = self._configuration(source)
        if self._before is not None:
            self._compare(self._before, self._now)
            loop.use(self._before.get("choice"))
        make_state(model, loop, source)
        with refusing_watches():
            self._program = program = loop.trace(source)
        self._variables = {**reproducibility.state_variables(model), **reproducibility.metric_variables(model)}
        self._variables |= unowned(program, {**self._variables, **reproducibility.process_variables()})
        self._all = {**self._variables, **reproducibility.process_variables()}
        self._read = reproducibility.Reader(self._variables)
        warn_of_hidden_state(program)
        if run.on_nan != "ignore":
            copies = [c for v in self._all.values() for c in replicas.copies(v)]
            loop.keep(copies, halts=run.on_nan != "skip")
        self._restored = self._restorable()
        if self._restored is not None:
            self._look_ahead(self._restored.manifest)
        self._sentry = Sentry(model, self._all, source, run.on_nan, run.spike, self._skipped, self._place)

    def _look_ahead(self, manifest):
        """What callbacks must know before the training begins for them."""
        stopped = manifest["stop_training"] and not manifest["batch"]
        self.was_finished = stopped or manifest["epoch"] >= self._arguments["epochs"]
        for callback in self._others:
            if isinstance(callback, keras.callbacks.CSVLogger):
                callback.append = True

    def _restorable(self):
        """The checkpoint to go on from. The chief looks first, as it sets damaged ones aside."""
        partial = self._run.resume == "partial"
        found = self._checkpoints.restore_latest(self._variables, partial) if self._team.chief else None
        (step,) = self._team.told(found.step if found else -1)
        if not self._team.chief and step >= 0:
            found = self._checkpoints.restore_latest(self._variables, partial)
            if found is None or found.step != step:
                raise CheckpointError(
                    f"The chief goes on from step {step}, and that is not the newest one to be seen here."
                )
        self._team.sums(0)  # all have read; from now on the chief may write
        return found

    def _configuration(self, source):
        data = {"examples": getattr(source, "examples", None), "steps_per_epoch": source.steps}
        training = environment.training(self.model, self._arguments)
        told = {"flags": self._flags(), "seed": self._run.seed, "data": data, config.TRAINING: training}
        return {**told, **environment.describe()}

    def _flags(self):
        run = self._run
        told = {"workdir": str(run.folder), "seed": run.seed, "checkpoint_every": str(run.every), "keep": run.keep}
        told |= {"resume": run.resume, "on_nan": run.on_nan, "log": ",".join(run.log)}
        simple = {k: v for k, v in self._arguments.items() if v is None or isinstance(v, bool | int | float | str)}
        simple.pop("verbose", None)
        return {**told, **simple, **run.settings}

    def _compare(self, before, now):
        changes = config.changes(before, now, partial=self._run.resume == "partial")
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
            engine = {"engine": self._loop.engine, "choice": self._loop.choice}
            self._place.write_json(workdir.CONFIG, {**self._now, **engine})
        self._open_writers()
        if self._before is not None:
            self._writer.resume(self.updates, position.epoch)
        if self._restored is None and self._run.on_nan == "rollback":
            self.save()  # so that there is something to go back to
        self._loop.position = position
        if self._run.profile:
            self._profile.folder = self._place.make_folder("tensorboard")
        self._hold()
        return position

    def _resume(self):
        manifest = self._restored.manifest
        if anew := self._restore():
            logging.warning(
                "These callbacks, or attributes of theirs, have no get_state/set_state and begin anew: %s",
                ", ".join(anew),
            )
        self._seconds_before = manifest["seconds"]
        self._sentry.set_state(manifest["sentry"])
        position = Position(manifest["epoch"], manifest["batch"])
        position.aggregate.set_state(self._of_the_step(manifest["aggregate"]))
        self._saved = (self._count(), position.epoch, position.batch)
        self.model.stop_training = manifest["stop_training"]
        where = (
            "is finished" if self.was_finished else f"goes on in epoch {position.epoch + 1}/{self._arguments['epochs']}"
        )
        tell(f"{self._run.folder} {where}: {self._count()} steps are done.")
        if not self._source.addressable and not self.was_finished:
            tell("The data cannot be positioned and are counted through: exact if they come in the same order again.")
        return position

    def _of_the_step(self, aggregate):
        """What an aggregate holds of the values that the step has: unnamed metrics made again have other names."""
        layout = None if self._program is None else self._program.layout
        if layout is None:
            return aggregate
        names = {c.name for c in layout.columns} | {r.name for r in layout.results}
        kept = {key: {n: v for n, v in aggregate[key].items() if n in names} for key in ("state", "results")}
        return {**aggregate, **kept, "order": [n for n in aggregate["order"] if n in names]}

    def on_place(self, drew):
        if self._restored is not None:
            self._drew = self._source.may_draw if drew is None else drew
            self._restore_random_state()

    def enter(self, position):
        if position.batch:  # what the beginning of the epoch did to the state was done before
            self._restore()
        self._moving = False

    def _restore(self):
        """Sets the state. Returns the names of what begins anew of the callbacks."""
        manifest, tensors = self._restored.manifest, self._restored.tensors
        process = reproducibility.process_variables(create="process/seed_generator" in tensors)
        reproducibility.assign({**self._variables, **process}, tensors)
        self._restore_random_state()
        return callback_state.set_states(self._others, manifest["callbacks"], tensors)

    def _restore_random_state(self):
        """Sets Python's and NumPy's global random numbers, unless the data draw from them as they are read again."""
        if not self._drew:
            state = callback_state.put_back(self._restored.manifest["random"], self._restored.tensors)
            reproducibility.set_random_state(state)

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

    def leaves_out(self, position):
        return (position.epoch, position.batch) in self._skipped

    def limit(self, steps):
        every, position = self._run.every.steps, self._loop.position
        if every is not None:
            steps = min(steps, every - self.updates % every)
        if self._skipped.ranges:
            ahead = (i for i in range(1, steps) if (position.epoch, position.batch + i) in self._skipped)
            steps = next(ahead, steps)
        return steps

    def before_chunk(self):
        self._moving = True
        self._profile.before_chunk(self.updates)

    def on_chunk(self, record, feed):
        position = self._loop.position
        record = self._sentry.look(record, feed, position)
        if len(record):
            names, values, due = record.scalars()
            steps = record.first + 1 + np.arange(len(record))
            self._writer.rows("train", steps, position.epoch, names, values.astype(record.rows.dtype), due)
            for name, index, counts in record.histograms():
                self._writer.histogram(name, index + 1, EDGES, counts)
        self.updates = record.first + len(record)
        self._moving = False
        return record

    def after_chunk(self):
        self._profile.after_chunk(self.updates)
        self._watchdog.alive()
        self._sentry.act()
        if self._stop.is_due(self._team):
            self._stop.end()
        self._owed = self._owed or self._is_due()
        save = self._owed and not self._checkpoints.busy  # a disk that is slower than asked for does not hold up steps
        copy = time.monotonic() - self._copied_at > self._copy_seconds / SHARE_OF_COPIES
        save, copy = self._team.told(save, copy)
        if save:
            self.save()
        elif copy:
            self._copy_state()

    def _is_due(self):
        every = self._run.every
        if every.steps is not None:
            return self.updates % every.steps == 0 and self._saved != self._here()
        return every.seconds is not None and time.monotonic() - self._saved_at >= every.seconds

    def before_end(self, validates):
        if validates or self._others_act:
            self._hold()

    def _hold(self):
        """From here on the state as it is now is what an error leaves: what follows is begun anew."""
        if self._copy is None or self._copy[0] != self._here():
            self._copy_state()
        self._moving = True

    def on_validation(self):
        self._watchdog.alive()
        if self._stop.is_due(self._team):
            self._stop.end()

    def on_epoch(self, epoch, logs):
        self._moving = False
        self._logs = files.numbers(logs)  # callbacks may have put anything there
        self._writer.scalars("epoch", self.updates, epoch, self._logs)
        if self._run.every == (None, None) or self._checkpoints.would_be_best(self._logs):
            self._owed = True
        save = self._owed and (self._run.best or not self._checkpoints.busy)
        if self._team.told(save)[0]:
            self.save()  # the best one must be that of the epoch's end, however long it takes
        if self._stop.is_due(self._team):
            self._stop.end()
        if self._others_act:
            self._hold()

    # Saving.

    def _state(self):
        """Everything that a checkpoint holds, copied: `(where, tensors, manifest)`."""
        position = self._loop.position
        states, tensors = callback_state.get_states(self._others)
        manifest = {
            "epoch": position.epoch,
            "batch": position.batch,
            "aggregate": position.aggregate.get_state(),
            "stop_training": bool(self.model.stop_training),
            "callbacks": states,
            "sentry": self._sentry.get_state(),
            "random": callback_state.take_out(reproducibility.random_state(), "process/random", tensors),
            "seconds": self._seconds(),
        }
        process = reproducibility.snapshot(reproducibility.process_variables())
        return self._here(), {**self._read(), **process, **tensors}, manifest

    def _copy_state(self):
        before = time.monotonic()
        self._copy = self._state()
        self._copied_at = time.monotonic()
        self._copy_seconds = self._copied_at - before

    def save(self, state=None, wait=False):
        """Saves the state as it is now, or a copy, on a thread."""
        where, tensors, manifest = self._copy = state or self._state()
        self._copied_at = time.monotonic()
        logs = self._logs if self._logs and manifest["batch"] == 0 else {}  # they are those of an epoch's end
        scores = {name: float(value) for name, value in logs.items()}
        flush = self._writer.flush
        self._checkpoints.save(where[0], tensors, manifest, scores, before_commit=flush, wait=wait, copy=False)
        self._saved_at, self._saved, self._owed = time.monotonic(), where, False

    def _here(self):
        return self.updates, self._loop.position.epoch, self._loop.position.batch

    def _seconds(self):
        return self._seconds_before + time.monotonic() - self._began

    # Ending.

    def finish(self):
        """Saves what further epochs go on from: the weights, before an optimizer puts its average in their place."""
        self._moving = False
        if not self.was_finished:
            self._save_at_the_end(None)

    def __enter__(self):
        self._watchdog.__enter__()
        return self

    def __exit__(self, kind, error, traceback):
        self._watchdog.__exit__()
        if self._team.size > 1 and isinstance(error, tf.errors.OpError):
            logging.error(
                "Another process of this run has ended, or does not answer. Start all of them again by the same "
                "command: the run goes on from the last checkpoint."
            )
        if self._writer is None:  # nothing was begun
            return
        try:
            at_once = isinstance(error, KeyboardInterrupt) and not self._stop.ended
            if error is None:
                self._summarize()
            elif not at_once and not self.was_finished and not isinstance(error, RolledBack):
                self._save_at_the_end(error)
        finally:
            self._close(error)

    def _save_at_the_end(self, error):
        try:
            self._wait()
            alone = self._team.size > 1 and error is not None and not self._stop.ended  # nobody else reads along
            if self._moving or alone:
                state = self._copy
                if not self._stop.ended:
                    logging.warning("What was under way did not end: the state after step %d is saved.", state[0][0])
            else:
                state = self._state()
            if self._saved != state[0]:
                self.save(state, wait=True)
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

    def _close(self, error):
        self._profile.close()
        try:
            self._writer.close()
        except OSError as failure:
            if error is None:
                raise
            logging.error("The logs could not be written: %s", failure)

    def _summarize(self):
        if self.was_finished and self._place.read_json(workdir.SUMMARY) is not None:
            return
        history = self.model.history.history if self.model.history else {}
        summary = {
            "metrics": files.numbers({name: values[-1] for name, values in history.items() if values}),
            "steps": self.updates,
            "epochs": self._loop.position.epoch,
            "seconds": self._seconds(),
            "engine": self._loop.engine,
            "fingerprint": reproducibility.fingerprint(self.model),
        }
        if self._sentry.count:
            summary["skipped_steps"] = self._sentry.count
        self._place.write_json(workdir.SUMMARY, summary)


def make_state(model, loop, source):
    """Makes the state that the user's own `train_step` would make, to be saved and restored: an optimizer's moments,
    a metric's sums."""
    if reproducibility.unbuilt_optimizers(model) or reproducibility.unbuilt_metrics(model):
        with refusing_watches():
            loop.build_optimizers(source)
    left = reproducibility.unbuilt_optimizers(model)
    if left and loop.trace(source) is None:  # what a trace did not build no step uses
        logging.warning(
            "Not built before the first step, so not saved: %s. Build it in __init__: optimizer.build(variables).",
            ", ".join(left),
        )


def unowned(program, known):
    """`name -> variable` for what a traced step writes to and no layer holds: variables that functions close over, or
    TensorFlow's own, such as that of `tf.random.get_global_generator()`."""
    if program is None:
        return {}
    handles = {id(copy.handle) for variable in known.values() for copy in replicas.copies(variable)}
    found = [variable for variable in program.changed if id(variable.handle) not in handles]
    return {f"process/variables/{index}": variable for index, variable in enumerate(found)}


def warn_of_hidden_state(program):
    hidden = sorted(tuner.HIDDEN_STATE.intersection(program.operations)) if program is not None else []
    if hidden:
        logging.warning(
            "The step holds %s (`tf.random.normal` and its like), whose state cannot be saved: after a resume other "
            "numbers are drawn. Use keras.random with a SeedGenerator, or a tf.random.Generator, that the model holds.",
            ", ".join(hidden),
        )


@contextlib.contextmanager
def refusing_watches():
    """A step that is traced finds out whether what is watched is there."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("watch("):
            raise Refused(f"--{error}") from error
        raise


def tell(text):
    """A line for whoever looks, whatever becomes of the logs."""
    print(text, file=sys.stderr, flush=True)


# The open ends of a histogram get an end, so that TensorBoard can draw them.
_ENDS = statistics.HISTOGRAM_EDGES[[0, -1]].astype(np.float64) * 10
EDGES = np.concatenate([_ENDS[:1], statistics.HISTOGRAM_EDGES, _ENDS[1:]])
