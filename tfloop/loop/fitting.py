"""The loop: epochs over a source through an engine, with callbacks, records and validation.

It knows a model as `steps`: something that runs steps, has state, and names what it measures.
"""

import contextlib
import time

import keras
import numpy as np
import tensorflow as tf

from tfloop.loop import source as sources
from tfloop.loop.engine import Runner
from tfloop.loop.observer import Observer, Position, observer_of
from tfloop.loop.record import Aggregate
from tfloop.progress import Progress


class Loop:
    """The loop of one compiled model."""

    def __init__(self, steps):
        self._steps = steps
        self._runner = Runner(steps)
        self.engine = None
        self.position = Position()  # of the fit that runs, or ran last

    # Training.

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
        source = sources.make_source(
            x, y, sample_weight, batch_size, steps_per_epoch, shuffle, class_weight, self._steps.seed
        )
        validation = self._validation(validation_data, validation_batch_size or batch_size, validation_steps)
        self._steps.build(source.spec)
        self._steps.start()
        hooks = Hooks(callbacks, model, epochs=epochs, steps=source.steps, verbose=verbose)
        observer = observer_of(hooks.callbacks)
        observer.on_built(self, source, hooks.callbacks)
        engine = self._choose(source)
        by_step = self._one_by_one(hooks)

        model.stop_training = False
        logs = {}
        pace = Pace(self._steps.choices["steps_per_execution"], by_step)
        hooks.on_train_begin()
        at = self.position = observer.start(Position(initial_epoch))
        for epoch in range(at.epoch, epochs):
            if model.stop_training:
                break
            if epoch != at.epoch:
                at = self.position = Position(epoch)
            model.reset_metrics()
            hooks.on_epoch_begin(epoch)
            observer.enter(at)
            with Progress(source.steps, True, at.batch, epoch=epoch, epochs=epochs, verbose=verbose) as bar:
                bar.update(at.batch, at.aggregate.values(), finalize=False)
                logs = self._train_epoch(engine, source, at, pace, hooks, bar)
                if validation is not None and is_due(epoch, validation_freq):
                    with self._steps.for_validation():
                        found = self._test(validation, hooks, nested(verbose), title="validation", transient=True)
                    logs = {**logs, **{f"val_{name}": value for name, value in found.items()}}
                hooks.on_epoch_end(epoch, logs)
                bar.finish(logs)
            self.position = Position(epoch + 1)
            observer.on_epoch(epoch, logs)
        hooks.on_train_end(logs)
        return model.history

    def _train_epoch(self, engine, source, position, pace, hooks, bar):
        for record in self._chunks(engine, "train", source, position, pace, hooks):
            bar.update(position.batch, position.aggregate.values(), finalize=False, examples=record.examples)
            if self._steps.model.stop_training:
                break
        if not position.batch:
            raise ValueError("The data are empty: the epoch has no batch. Expected at least one.")
        return position.aggregate.values()

    def _chunks(self, engine, kind, source, position, pace, hooks):
        """Runs an epoch from a position on, chunk by chunk; yields the records, which the position and the hooks
        have seen."""
        begin, end = (getattr(hooks, f"on_{kind}_batch_{when}") for when in ("begin", "end"))
        feeder = source.feeder(position.epoch, position.batch, capacity=pace.capacity(source.steps))
        training = kind == "train"
        observer = observer_of(hooks.callbacks) if training else Observer()
        first = int(self._steps.updates.numpy())
        while True:
            feed = feeder.take(observer.limit(pace.next()))
            if feed is None:
                return
            begin(position.batch)
            started = time.perf_counter()
            record = self._runner.run(self._engine_for(engine, feed), kind, feed, first)
            pace.ran(len(record), time.perf_counter() - started)
            if feed.kind == "iterator":
                feeder.took(len(record), feed.count)
            if not len(record):
                return
            position.batch += len(record)
            first += len(record) if training else 0
            record = observer.on_chunk(record)
            position.aggregate.add(record)
            values = position.aggregate.values()
            self._steps.publish(values)
            end(position.batch - 1, values)
            observer.after_chunk()
            yield record

    def _engine_for(self, engine, feed):
        """An epoch's short last batch is not worth a compilation that nobody asked for."""
        return "graph" if feed.short and engine != "eager" and self._steps.choices["jit_compile"] == "auto" else engine

    def _choose(self, source):
        if self._steps.eager:
            self.engine = "eager"
        else:
            chosen = {True: "jit", "step": "jit", "loop": "scan", False: "graph", "auto": "graph"}
            self.engine = chosen[self._steps.choices["jit_compile"]]
            if self.engine == "scan" and isinstance(source, sources.DatasetSource):
                self.engine = "jit"  # a tf.data iterator cannot be read inside a compiled chunk
        return self.engine

    def _one_by_one(self, hooks, kind="train"):
        return self._steps.eager or any(wants_batches(c, kind) for c in hooks.callbacks)

    # Evaluation and prediction.

    def _validation(self, data, batch_size, steps):
        if data is None:
            return None
        if isinstance(data, list | tuple):
            if len(data) not in (2, 3):
                raise ValueError(
                    f"validation_data has {len(data)} parts. Expected (x, y) or (x, y, sample_weight), or a dataset."
                )
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(tuple(data))
        else:
            x, y, sample_weight = data, None, None
        batched = isinstance(x, tf.data.Dataset | keras.utils.PyDataset) or sources.is_iterable_of_batches(x)
        return sources.make_source(x, y, sample_weight, None if batched else batch_size, steps)

    def evaluate(self, x, y, *, batch_size, verbose, sample_weight, steps, callbacks):
        source = sources.make_source(x, y, sample_weight, batch_size, steps)
        self._steps.build(source.spec)
        hooks = Hooks(callbacks, self._steps.model, epochs=1, steps=source.steps, verbose=verbose)
        return self._test(source, hooks, verbose)

    def _test(self, source, hooks, verbose, **display):
        model = self._steps.model
        engine = self._choose(source)
        model.reset_metrics()
        position = Position()
        pace = Pace(self._steps.choices["steps_per_execution"], self._one_by_one(hooks, "test"))
        model.stop_evaluating = False
        hooks.on_test_begin()
        with Progress(source.steps, stateful=True, verbose=verbose, **display) as bar:
            for record in self._chunks(engine, "test", source, position, pace, hooks):
                bar.update(position.batch, position.aggregate.values(), finalize=False, examples=record.examples)
                if model.stop_evaluating:
                    break
            if not position.batch:
                raise ValueError("The data are empty: there is no batch to evaluate. Expected at least one.")
            logs = position.aggregate.values()
            hooks.on_test_end(logs)
            bar.finish(logs)
        return logs

    def predict(self, x, *, batch_size, verbose, steps, callbacks):
        source = sources.make_source(x, None, None, batch_size, steps)
        self._steps.build_for_prediction(source.spec)
        hooks = Hooks(callbacks, self._steps.model, epochs=1, steps=source.steps, verbose=verbose)
        bar = Progress(source.steps, verbose=verbose)
        model = self._steps.model
        model.stop_predicting = False
        outputs, done = [], 0
        with self._metrics_untouched():
            hooks.on_predict_begin()
            for batch in batches(source):
                hooks.on_predict_batch_begin(done)
                outputs.append(self._predict_batch(batch))
                hooks.on_predict_batch_end(done, {"outputs": outputs[-1]})
                done += 1
                bar.update(done, {})
                if model.stop_predicting:
                    break
            hooks.on_predict_end()
        if not outputs:
            raise ValueError("The data are empty: there is no batch to predict. Expected at least one.")
        bar.finish()
        return tf.nest.map_structure(lambda *parts: concatenated(parts), *outputs)

    def predict_on_batch(self, x):
        batch = tf.nest.map_structure(sources.as_array, keras.utils.pack_x_y_sample_weight(x))
        self._steps.build_for_prediction(sources.spec_of(batch))
        with self._metrics_untouched():
            return tf.nest.map_structure(to_numpy, self._predict_batch(batch))

    def _predict_batch(self, batch):
        spec = sources.spec_of(batch)
        tensors = [
            tf.convert_to_tensor(t) if not isinstance(t, tf.RaggedTensor | tf.SparseTensor) else t
            for t in sources.flat(batch)
        ]
        return self._runner.predict(spec, tensors, self._steps.eager)

    @contextlib.contextmanager
    def _metrics_untouched(self):
        """Metric objects that `call` updates are as they were after a prediction."""
        variables = self._steps.metric_variables()
        before = [v.numpy() for v in variables]
        try:
            yield
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)

    # Single batches.

    def on_batch(self, kind, x, y, sample_weight=None, class_weight=None):
        data = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        data = tf.nest.map_structure(sources.as_array, data)
        if class_weight is not None:
            data = sources.weighing(class_weight)(data)
        sources.common_length(data)
        self._steps.build(sources.spec_of(data))
        if kind == "train":
            self._steps.start()
        engine = "eager" if self._steps.eager else "graph"
        first = int(self._steps.updates.numpy())
        self._steps.model.reset_metrics()
        aggregate = Aggregate()
        aggregate.add(self._runner.run_batch(engine, kind, data, first))
        logs = aggregate.values()
        self._steps.publish(logs)
        return logs


class Pace:
    """How many steps the next chunk has: about a tenth of a second's worth, or what the user asked for.

    `clock_seconds` is the wanted length of a chunk.
    """

    seconds = 0.1
    most = 1024

    def __init__(self, steps_per_execution, by_step):
        self._fixed = 1 if by_step else None if steps_per_execution == "auto" else steps_per_execution
        self._count = self._fixed or 1
        self._ran = 0

    def capacity(self, steps):
        """The most steps that a chunk may have."""
        return self._fixed or min(self.most, steps or self.most)

    def next(self):
        return self._count

    def ran(self, steps, seconds):
        self._ran += 1
        if self._fixed is None and steps and self._ran > 1:  # the first call holds the tracing
            wanted = int(self.seconds * steps / max(seconds, 1e-9))
            self._count = max(1, min(self.most, wanted, 8 * self._count))


class Hooks:
    """The callbacks of a fit. `hooks.on_epoch_end(epoch, logs)` calls that of each, in order.

    Keras' own `CallbackList` would sort the logs by name; here they keep the order in which they are shown.
    """

    def __init__(self, callbacks, model, **params):
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = keras.callbacks.CallbackList(
                callbacks, add_history=True, add_progbar=False, model=model, **params
            )
        self.callbacks = callbacks.callbacks

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)

        def call(*args):
            logs = args[-1] if args and isinstance(args[-1], dict) else None
            where = args[:-1] if logs is not None else args
            for callback in self.callbacks:
                getattr(callback, name)(*where, None if logs is None else dict(logs))

        return call


def nested(verbose):
    """How much an evaluation inside an epoch shows: a bar while it runs, and no line of its own."""
    return verbose if verbose in (1, "auto", "bar") else 0


def wants_batches(callback, kind="train"):
    """Whether a callback overrides the hooks of single batches, so that it must see every step."""
    if getattr(callback, "save_freq", None) == "epoch" and isinstance(
        callback, keras.callbacks.ModelCheckpoint | keras.callbacks.BackupAndRestore
    ):
        return False
    if isinstance(callback, keras.callbacks.LambdaCallback):
        hooks = ("on_train_batch_begin", "on_train_batch_end") if kind == "train" else ()
        return any(name in vars(callback) for name in hooks)
    base = keras.callbacks.Callback
    hooks = [f"on_{kind}_batch_begin", f"on_{kind}_batch_end"]
    if kind == "train":
        hooks += ["on_batch_begin", "on_batch_end"]
    return any(getattr(type(callback), name, None) is not getattr(base, name) for name in hooks)


def batches(source):
    """The batches of a source's first epoch, one by one, as host arrays or tensors."""
    feeder = source.feeder(0)
    while (feed := feeder.take(1)) is not None:
        if feed.kind == "iterator":
            batch = feed.args[0].get_next_as_optional()
            more = bool(batch.has_value())
            feeder.took(int(more), 1)
            if not more:
                return
            yield batch.get_value()
        else:
            yield sources.packed(feed.spec, sources.batch_of(feed.kind, feed.args, 0))


def concatenated(parts):
    parts = [to_numpy(p) for p in parts]
    if isinstance(parts[0], tf.RaggedTensor | tf.SparseTensor):
        return tf.concat(parts, 0)
    return np.concatenate([np.atleast_1d(p) for p in parts]) if len(parts) > 1 else parts[0]


def to_numpy(value):
    return value.numpy() if hasattr(value, "numpy") and not isinstance(value, tf.RaggedTensor) else value


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
