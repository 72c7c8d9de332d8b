"""The loop: epochs over a source through an engine, with callbacks, records and validation.

It knows a model as `steps`: something that runs steps, has state, and names what it measures.
"""

import contextlib
import time

import keras
import numpy as np
import tensorflow as tf

from tfloop import names, reproducibility
from tfloop.loop import memory, tuner
from tfloop.loop import source as sources
from tfloop.loop.accumulation import accumulated
from tfloop.loop.batchwise import Batchwise, first_batch
from tfloop.loop.engine import COMPILED, Runner, untouched
from tfloop.loop.feed import batches_of, warn_ran_out
from tfloop.loop.hooks import Hooks
from tfloop.loop.keeper import Keeper
from tfloop.loop.observer import Observer, Position, observer_of
from tfloop.loop.pace import Pace
from tfloop.loop.replay import count_through, was_read
from tfloop.progress import Progress

VALIDATION = {"title": "validation", "transient": True}  # how the bar of a validation within an epoch looks


class Loop:
    """The loop of one compiled model."""

    def __init__(self, steps):
        self._steps = steps
        self._runner = Runner(steps)
        self._tuner = tuner.Tuner(self._runner)
        self.batchwise = Batchwise(steps, self._runner)
        self._keeper = None
        self._given = None  # the choice of an earlier process
        self._chosen = None
        self.engine = None
        self.position = Position()  # of the fit that runs, or ran last
        self._is_between_batches = False  # while callbacks of an epoch's batches run

    @property
    def choice(self):
        """The engines that the last fit chose, as plain data for `use`; `None` before the first."""
        return None if self._chosen is None else self._chosen.as_dict()

    def use(self, choice):
        """Makes later fits take the engine that was chosen before: a `choice`, or an engine's name.

        An engine that `compile` asks for explicitly goes before.
        """
        self._given = None if choice is None else tuner.given(choice)

    def measure_each_step(self):
        """From now on records have what compiled metrics measured in each step alone, for those who log steps."""
        self._steps.measure_each_step()

    @property
    def team(self):
        """The processes that train together: see `Team`."""
        return self._steps.team

    def build(self, source, kind="train"):
        """Makes all variables that steps need."""
        self._runner.build(kind, source.spec, lambda: first_batch(source))

    def trace(self, source):
        """Traces the training step: that makes what it makes when it first runs. Returns its `Program`.

        Where it is run eagerly there is nothing to be traced, and `None`.
        """
        if self._steps.eager:
            return None
        program = self._runner.program("train", source.spec)
        program.traced()
        return program

    def build_optimizers(self, source):
        """Builds the optimizers that the training step builds when it first runs."""
        if not self._steps.eager:
            self.trace(source)
            return
        self._steps.build_optimizers(first_batch(source))

    def step(self, batch):
        """Makes one training step on a batch. Returns its row and layout."""
        return self._steps.run("train", batch)

    def guard(self):
        """For the fit that begins: steps say if their numbers are not finite. Before the step is traced."""
        self._steps.guarded = True

    def keep(self, variables, halts):
        """For the fit that begins: what is not finite is taken back. See `Keeper`."""
        self._keeper = Keeper(variables, halts)

    # Training.

    @memory.kept()
    def fit(
        self,
        x,
        y,
        *,
        batch_size,
        epochs,
        verbose,
        callbacks,
        validation_split,
        validation_data,
        shuffle,
        class_weight,
        sample_weight,
        initial_epoch,
        steps_per_epoch,
        validation_steps,
        validation_batch_size,
        validation_freq,
    ):
        model = self._steps.model
        check_epochs(epochs, initial_epoch)
        check_frequency(validation_freq)
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = sources.split(x, y, sample_weight, validation_split)
        random = reproducibility.random_state()  # before a stream is read ahead
        source = sources.make_source(
            x, y, sample_weight, batch_size, steps_per_epoch, shuffle, class_weight, self._steps.seed, goes_on=True
        )
        source.read_before = was_read(x)
        validation = self._validation(validation_data, validation_batch_size or batch_size, validation_steps)
        if self._steps.choices["accumulate"] > 1:
            source, self._steps.micro_batch = accumulated(source, self._steps.choices["accumulate"])
        self.build(source)
        self._steps.start()
        hooks = Hooks(callbacks, model, epochs=epochs, steps=source.steps, verbose=verbose)
        observer = observer_of(hooks.callbacks)
        self._keeper, self._steps.guarded = None, False
        observer.on_built(self, source, hooks.callbacks)
        if observer.was_finished:
            hooks.silence()
        by_step = self._one_by_one(hooks)
        pace = Pace(self._steps.choices["steps_per_execution"], by_step)
        engine = self._choose(source, validation, epochs - initial_epoch, pace, verbose)
        model.stop_training = False
        logs = {}
        hooks.on_train_begin()
        initial_epoch = self._steps.initial_epoch(initial_epoch)
        at = self.position = observer.start(Position(initial_epoch))
        drew = False
        if at.epoch < epochs and not model.stop_training:
            drew = self._count_through(source, validation, initial_epoch, at.epoch, validation_freq, random)
        observer.on_place(drew)
        validated = at.epoch > initial_epoch
        with contextlib.ExitStack() as stack:
            for epoch in range(at.epoch, epochs):
                if epoch != at.epoch:
                    at = self.position = Position(epoch)
                    stack.enter_context(names.unchanging())  # the first epoch may still make layers
                if model.stop_training and not at.batch:
                    break
                self._steps.reset_metrics()
                hooks.on_epoch_begin(epoch)
                observer.enter(at)
                with Progress(source.steps, True, at.batch, epoch=epoch, epochs=epochs, verbose=verbose) as bar:
                    bar.update(at.batch, at.aggregate.values(), finalize=False)
                    values = self._train_epoch(engine, source, at, pace, hooks, bar)
                    if not at.batch:
                        says_empty(source, first=epoch == initial_epoch)
                        break
                    logs = values
                    validates = validation is not None and is_due(epoch, validation_freq)
                    observer.before_end(validates)
                    if validates:
                        with self._steps.for_validation():
                            found = self._test(validation, hooks, nested(verbose), observer, validated, **VALIDATION)
                        validated = True
                        logs = {**logs, **{f"val_{name}": value for name, value in found.items()}}
                    hooks.on_epoch_end(epoch, logs)
                    bar.finish({name: value for name, value in logs.items() if is_shown(value)})
                self.position = Position(epoch + 1)
                observer.on_epoch(epoch, logs)
        observer.finish()
        self._steps.finish()
        hooks.on_train_end(logs)
        return model.history

    def _count_through(self, source, validation, first, end, validation_freq, random):
        """Reads again what was read in the epochs that an earlier process made.

        Returns whether that drew from the global random numbers; `None` if there is nothing to be read.
        """
        if first >= end:
            return None
        drew = count_through(source, range(first, end), random)
        if validation is not None:
            due = [0] * sum(is_due(epoch, validation_freq) for epoch in range(first, end))
            drew = count_through(validation, due) or drew
        return drew

    def _train_epoch(self, engine, source, position, pace, hooks, bar):
        stopped = position.batch and self._steps.model.stop_training  # in an earlier process, within this epoch
        for record in () if stopped else self._chunks(engine, "train", source, position, pace, hooks):
            bar.update(position.batch, position.aggregate.values(), finalize=False, examples=record.examples)
            if self._steps.model.stop_training:
                break
        return position.aggregate.values()

    def _chunks(self, engine, kind, source, position, pace, hooks):
        """Runs an epoch from a position on, chunk by chunk; yields the records, which the position and the hooks
        have seen."""
        begin, end = (getattr(hooks, f"on_{kind}_batch_{when}") for when in ("begin", "end"))
        observer = observer_of(hooks.callbacks) if kind == "train" else Observer()
        first = int(self._steps.updates.numpy())
        publish, listening = None, hooks.want_batches(kind)
        with self._feeder(source, position, engine, kind, pace) as feeder, self._runner.unchanging():
            team = self.team
            while (feed := self._take(feeder, position, observer, pace, team)) is not None:
                with self._between_batches():
                    begin(position.batch)
                observer.before_chunk()
                started = time.perf_counter()
                record = self._run(self._engine_for(engine, feed), kind, feed, first)
                if not feed.short:  # an epoch's last batch has a program of its own, which is slow at first
                    pace.ran(len(record), time.perf_counter() - started)
                if feed.kind == "iterator" and record.error is None:
                    feeder.took(len(record), feed.count)
                if not len(record):
                    return
                position.batch += len(record)
                record = observer.on_chunk(record, feed)
                first += len(record) if kind == "train" else 0
                position.aggregate.add(record)
                values = position.aggregate.values()
                publish = publish or self._steps.publisher()  # after the trace, which may make metrics
                if listening:
                    publish(values)
                if values:  # there are none before the first step that was not taken back
                    with self._between_batches():
                        end(position.batch - 1, values)
                observer.after_chunk()
                try:
                    yield record
                except GeneratorExit:  # somebody wants to stop: the last values are the epoch's
                    publish(values)
                    raise
                if record.error is not None:
                    raise record.error
        if publish is not None:
            publish(position.aggregate.values())

    def _run(self, engine, kind, feed, first):
        if kind == "train" and self._keeper is not None:
            return self._keeper.run(self._runner, engine, kind, feed, first)
        return self._runner.run(engine, kind, feed, first)

    def _take(self, feeder, position, observer, pace, team):
        """The next feed, behind the batches that the observer leaves out."""
        while observer.leaves_out(position) and next(batches_of(feeder), None) is not None:
            position.batch += 1
        return feeder.take(*team.told(observer.limit(pace.next())))

    @contextlib.contextmanager
    def _feeder(self, source, position, engine, kind, pace):
        """What hands out an epoch's feeds. Closed when the epoch ends before its data do."""
        capacity = pace.capacity(source.steps)
        blocks = self._runner.takes_blocks(engine, kind)
        feeder = source.feeder(position.epoch, position.batch, capacity, blocks=blocks)
        try:
            yield feeder
        except BaseException:
            feeder.close()
            raise

    def _engine_for(self, engine, feed):
        """An epoch's short last batch is not worth a compilation that nobody asked for."""
        if feed.kind == "batch" and engine in COMPILED:
            return "graph"
        return "graph" if feed.short and engine in COMPILED and not self._is_explicit() else engine

    def _choose(self, source, validation, epochs, pace, verbose):
        """The engine of a fit; that of its evaluations is in `self._chosen`."""
        self._chosen = self._explicit(source)
        if self._chosen is None:
            steps = None if source.steps is None else source.steps * epochs
            tests = 0 if validation is None else (validation.steps or 0) * epochs
            self._chosen = self._tuner.choose(source, steps, tests, pace.capacity(source.steps))
            if self._chosen.why and verbose not in (0, "none"):
                print(self._chosen.why, flush=True)
        pace.expect(self._chosen.seconds.get(self._chosen.engine))
        self.engine = self._chosen.engine
        return self.engine

    def _explicit(self, source):
        """The choice that was made by the user or by an earlier process, or `None`."""
        if self._steps.eager:
            return tuner.given("eager")
        if self._is_explicit():
            chosen = tuner.given(tuner.EXPLICIT[self._steps.choices["jit_compile"]])
        else:
            chosen = self._given
        if chosen is not None and chosen.engine in COMPILED:
            notes = tuner.uncompilable(self._runner.program("train", source.spec))
            if notes:
                raise ValueError(
                    f"jit_compile={self._steps.choices['jit_compile']!r} asks for engine {chosen.engine!r}, but XLA "
                    f"cannot compile the step: {notes}. Leave jit_compile at 'auto', or set it to False."
                )
        return chosen

    def _is_explicit(self):
        return self._steps.choices["jit_compile"] != "auto"

    def _evaluation_engine(self):
        if self._steps.eager:
            return "eager"
        if self._is_explicit():
            return tuner.EXPLICIT[self._steps.choices["jit_compile"]]
        chosen = self._chosen or self._given
        return "graph" if chosen is None or chosen.evaluation == "eager" else chosen.evaluation

    def _one_by_one(self, hooks, kind="train"):
        return self._steps.eager or hooks.want_batches(kind)

    # Evaluation.

    @contextlib.contextmanager
    def _between_batches(self):
        before, self._is_between_batches = self._is_between_batches, True
        try:
            yield
        finally:
            self._is_between_batches = before

    def apart(self):
        """The context for what a callback evaluates between two batches: the epoch's metrics go on as they were."""
        return untouched(self._steps.metric_variables()) if self._is_between_batches else contextlib.nullcontext()

    def _validation(self, data, batch_size, steps):
        if data is None:
            return None
        if isinstance(data, list | tuple):
            if len(data) not in (1, 2, 3):
                raise ValueError(
                    f"validation_data has {len(data)} parts. Expected (x,), (x, y), (x, y, sample_weight) or a dataset."
                )
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(tuple(data))
        else:
            x, y, sample_weight = data, None, None
        batched = isinstance(x, tf.data.Dataset | keras.utils.PyDataset) or sources.is_iterable_of_batches(x)
        return sources.make_source(x, y, sample_weight, None if batched else batch_size, steps)

    @memory.kept()
    def evaluate(self, x, y, *, batch_size, verbose, sample_weight, steps, callbacks):
        source = sources.make_source(x, y, sample_weight, batch_size, steps)
        self.build(source, "test")
        hooks = Hooks(callbacks, self._steps.model, epochs=1, steps=source.steps, verbose=verbose)
        return self._test(source, hooks, verbose, Observer())

    def _test(self, source, hooks, verbose, observer, again=False, **display):
        model = self._steps.model
        engine = self._evaluation_engine()
        self._steps.reset_metrics()
        position = Position()
        pace = Pace(self._steps.choices["steps_per_execution"], self._one_by_one(hooks, "test"))
        model.stop_evaluating = False
        hooks.on_test_begin()
        with Progress(source.steps, stateful=True, verbose=verbose, **display) as bar:
            for record in self._chunks(engine, "test", source, position, pace, hooks):
                bar.update(position.batch, position.aggregate.values(), finalize=False, examples=record.examples)
                observer.on_validation()
                if model.stop_evaluating:
                    break
            if not position.batch:
                says_empty(source, first=not again)
            logs = position.aggregate.values()
            hooks.on_test_end(logs)
            bar.finish(logs)
        return logs


def nested(verbose):
    """How much an evaluation inside an epoch shows: a bar while it runs, and no line of its own."""
    return verbose if verbose in (1, "auto", "bar") else 0


def says_empty(source, first):
    """Data without a batch are an error. If they had some before, a generator is used up, and Keras warns of that."""
    if first:
        raise ValueError("The data are empty: there is no batch. Expected at least one.")
    warn_ran_out(source.steps)


def is_shown(value):
    """Whether a bar can show what is in the logs: a callback may put anything there."""
    if isinstance(value, float):
        return True
    try:
        float(np.mean(np.asarray(value)))
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


def check_epochs(epochs, initial_epoch):
    for name, value, least in (("epochs", epochs, 0), ("initial_epoch", initial_epoch, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r}: expected a whole number, {least} or more.")


def check_frequency(frequency):
    if isinstance(frequency, int) and not isinstance(frequency, bool) and frequency > 0:
        return
    if not isinstance(frequency, list | tuple | set):
        raise ValueError(f"validation_freq={frequency!r}: expected a number of epochs or a list of epochs.")


def is_due(epoch, frequency):
    return (epoch + 1) % frequency == 0 if isinstance(frequency, int) else epoch + 1 in frequency
