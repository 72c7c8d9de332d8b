"""Engine: a way to run a chunk of steps.

A `Program` is one kind of step for one form of batch, traced once. An engine runs `count` batches of a feed
through it and returns the rows: `eager` calls Python for every step, `graph` loops over the steps inside a
graph, `jit` does so with the step compiled by XLA, `scan` compiles the whole chunk.
"""

import functools

import numpy as np
import tensorflow as tf

from tfloop.loop import source as sources
from tfloop.loop.record import Record

ENGINES = ("eager", "graph", "jit", "scan")


class Program:
    """One kind of step (`"train"`, `"test"`) for one structure, shape and dtype of batch."""

    def __init__(self, steps, kind, spec):
        self.kind, self.spec = kind, spec
        self._steps = steps
        self._step = None
        self._chunks = {}
        self.layout = None
        self.dtype = tf.float32

    def run_eagerly(self, tensors):
        """One step in plain Python."""
        row, self.layout = self._steps.run(self.kind, sources.packed(self.spec, tensors))
        return row

    @property
    def step(self):
        """The step as a concrete function of the batch's flat tensors, which gives the row."""
        if self._step is None:
            specs = [
                tf.TensorSpec(s.shape, s.dtype) if isinstance(s, tf.TensorSpec) else s for s in sources.flat(self.spec)
            ]
            traced = tf.function(lambda *tensors: self.run_eagerly(tensors), autograph=False)
            self._step = traced.get_concrete_function(*specs)
            self.dtype = self._step.output_dtypes
        return self._step

    def predict_eagerly(self, *tensors):
        return self._steps.run("predict", sources.packed(self.spec, tensors))

    @functools.cached_property
    def predict(self):
        return tf.function(self.predict_eagerly, autograph=False)

    def results(self):
        """The values that are read once a chunk, as one vector."""
        values = [tf.cast(r.read(), self.dtype) for r in self.layout.results]
        return tf.stack(values) if values else tf.zeros([0], self.dtype)

    @functools.cached_property
    def read_results(self):
        return tf.function(self.results, autograph=False)

    def chunk(self, engine, feed_kind, capacity):
        """The compiled function `(args, count) -> rows, how many, results` for an engine and a kind of feed."""
        key = (engine, feed_kind, capacity)
        if key not in self._chunks:
            step = self.step
            if engine == "jit":
                step = tf.function(lambda *tensors: self.step(*tensors), autograph=False, jit_compile=True)
            run = {"iterator": self._stream_chunk}.get(feed_kind, self._gather_chunk)
            body = functools.partial(run, step, feed_kind, capacity)
            self._chunks[key] = tf.function(body, autograph=False, jit_compile=engine == "scan")
        return self._chunks[key]

    def _gather_chunk(self, step, feed_kind, capacity, args, count):
        def body(i, rows):
            row = step(*sources.batch_of(feed_kind, args, i))
            return i + 1, tf.tensor_scatter_nd_update(rows, [[i]], [row])

        rows = tf.zeros((capacity, self.layout.width), self.dtype)
        done, rows = tf.while_loop(lambda i, _: i < count, body, (tf.constant(0), rows))
        return rows, done, self.results()

    def _stream_chunk(self, step, feed_kind, capacity, args, count):
        (iterator,) = args

        def body(i, _, rows):
            batch = iterator.get_next_as_optional()

            def train():
                row = step(*sources.flat(batch.get_value()))
                return i + 1, tf.tensor_scatter_nd_update(rows, [[i]], [row])

            more = batch.has_value()
            i, rows = tf.cond(more, train, lambda: (i, rows))
            return i, more, rows

        rows = tf.zeros((capacity, self.layout.width), self.dtype)
        start = (tf.constant(0), tf.constant(True), rows)
        done, _, rows = tf.while_loop(lambda i, more, _: more & (i < count), body, start)
        return rows, done, self.results()


class Runner:
    """Runs chunks of steps: keeps a program for every kind of step and form of batch."""

    def __init__(self, steps):
        self._steps = steps
        self._programs = {}

    def program(self, kind, spec):
        key = (
            kind,
            tf.nest.pack_sequence_as(spec, [0] * len(tf.nest.flatten(spec))).__repr__(),
            tuple(sources.flat(spec)),
        )
        key = (*key, tuple(s is None for s in tf.nest.flatten(spec)), self._steps.version)
        if key not in self._programs:
            self._programs[key] = Program(self._steps, kind, spec)
        return self._programs[key]

    def run(self, engine, kind, feed, first):
        """Runs a feed's batches. `first` is the number of updates completed before. Returns a `Record`."""
        program = self.program(kind, feed.spec)
        if engine == "eager":
            return self._run_eagerly(program, feed, first)
        program.step  # noqa: B018  traced before the chunk is: its layout says how wide the rows are
        capacity = self._capacity(feed)
        rows, done, results = program.chunk(engine, feed.kind, capacity)(feed.args, tf.constant(feed.count))
        done = int(done) if feed.kind == "iterator" else feed.count
        return record(program.layout, first, rows.numpy()[:done], results.numpy())

    def _capacity(self, feed):
        if feed.kind == "iterator":
            return max(1, 1 << (feed.count - 1).bit_length())
        return int((feed.args[1] if feed.kind == "rows" else feed.args[0]).shape[0])

    def _run_eagerly(self, program, feed, first):
        rows = []
        for i in range(feed.count):
            if feed.kind == "iterator":
                batch = feed.args[0].get_next_as_optional()
                if not batch.has_value():
                    break
                tensors = sources.flat(batch.get_value())
            else:
                tensors = sources.batch_of(feed.kind, feed.args, i)
            rows.append(program.run_eagerly([tf.convert_to_tensor(t) for t in tensors]).numpy())
        if not rows:
            return Record(None, first, np.zeros((0, 1)), {})
        return record(program.layout, first, np.stack(rows), program.results().numpy())

    def run_batch(self, engine, kind, batch, first):
        """One step on one batch of tensors, as `train_on_batch` does it."""
        spec = sources.spec_of(batch)
        program = self.program(kind, spec)
        tensors = [tf.convert_to_tensor(t) for t in sources.flat(batch)]
        if engine == "eager":
            row = program.run_eagerly(tensors)
            return record(program.layout, first, row.numpy()[None], program.results().numpy())
        row = program.step(*tensors)
        return record(program.layout, first, row.numpy()[None], program.read_results().numpy())

    def predict(self, spec, tensors, eager):
        """The predictions for one batch."""
        program = self.program("predict", spec)
        return program.predict_eagerly(*tensors) if eager else program.predict(*tensors)


def record(layout, first, rows, results):
    values = {r.name: float(v) for r, v in zip(layout.results, results, strict=True)}
    return Record(layout, first, rows, values)
