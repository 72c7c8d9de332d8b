"""Engine: a way to run a chunk of steps.

A `Program` is one kind of step for one form of batch, traced once. An engine runs `count` batches of a feed
through it and returns the rows: `eager` calls Python for every step, `graph` loops over the steps inside a
graph, `jit` does so with the step compiled by XLA, `scan` compiles the whole chunk.
"""

import contextlib
import functools

import numpy as np
import tensorflow as tf

from tfloop import _keras
from tfloop.loop import random_numbers
from tfloop.loop.devices import on_gpu
from tfloop.loop.feed import COMPOSITE, batch_of, flat, packed
from tfloop.loop.record import Record
from tfloop.operation import Operation
from tfloop.plain import plain_variable

ENGINES = ("eager", "graph", "jit", "scan")
COMPILED = ("jit", "scan")

LOOPS = {"While", "StatelessWhile"}  # gradients of these are made in another way for XLA

# Steps that a compiled chunk makes without asking if there is another. A GPU has to be waited for at each such
# question, and a small step takes no longer than that.
TOGETHER_ON_GPU = 16


class Program:
    """One kind of step (`"train"`, `"test"`) for one structure, shape and dtype of batch."""

    def __init__(self, steps, kind, spec):
        self.kind, self.spec = kind, spec
        self._steps = steps
        self._traced = {}  # whether it was for XLA -> concrete function
        self._chunks = {}
        self.layout = None
        self.dtype = tf.float32

    def run_eagerly(self, tensors, compiled=False):
        """One step in plain Python."""
        row, self.layout = self._steps.run(self.kind, packed(self.spec, tensors), compiled)
        return row

    def traced(self, compiled=False):
        """The step as a concrete function of the batch's flat tensors, which gives the row.

        Where a part of it has to be written in another way for XLA, there are two of them.
        """
        compiled = compiled and self._differs_when_compiled
        if compiled not in self._traced:
            specs = [tf.TensorSpec(s.shape, s.dtype) if isinstance(s, tf.TensorSpec) else s for s in flat(self.spec)]

            def step(*tensors):
                with _keras.traced_for_xla() if compiled else contextlib.nullcontext():
                    return self.run_eagerly(tensors, compiled)

            with random_numbers.same_everywhere():
                self._traced[compiled] = tf.function(step, autograph=False).get_concrete_function(*specs)
            self.dtype = self._traced[compiled].output_dtypes
        return self._traced[compiled]

    @functools.cached_property
    def _differs_when_compiled(self):
        differs = self.kind == "train" and self._steps.differs_when_compiled
        return differs or not LOOPS.isdisjoint(self.operations)

    @property
    def step(self):
        """The step as it was traced first."""
        return next(iter(self._traced.values())) if self._traced else self.traced()

    @property
    def variables(self):
        """Every variable that the step reads or writes."""
        return list(self.step.graph.variables)

    @property
    def changed(self):
        """The variables that the step writes to, in the order in which it comes to them."""
        by_handle = {id(v.handle): v for v in self.variables}
        written = map(id, _keras.written_resources(self.step.graph))
        return [by_handle[handle] for handle in written if handle in by_handle]

    @property
    def operations(self):
        """The types of the operations in the step, those of inner functions too, one for each operation."""
        graph = self.step.graph.as_graph_def()
        return [n.op for n in graph.node] + [n.op for f in graph.library.function for n in f.node_def]

    def predict_eagerly(self, *tensors):
        """The predictions, in plain Python."""
        return self._steps.run("predict", packed(self.spec, tensors))

    def results(self):
        """The values that are read once a chunk, as one vector."""
        values = [tf.cast(r.read(), self.dtype) for r in self.layout.results]
        return tf.stack(values) if values else tf.zeros([0], self.dtype)

    def read_results(self):
        """What `results` holds now, as an array."""
        return self._read_results()[0].numpy() if self.layout.results else np.zeros(0)

    @functools.cached_property
    def _read_results(self):
        return Operation(tf.function(self.results, autograph=False).get_concrete_function())

    @functools.cached_property
    def alone(self):
        """The step as a `SingleStep`."""
        return SingleStep(self, self._steps)

    @functools.cached_property
    def prediction(self):
        """Of a program that predicts: the step as a `Prediction`."""
        return Prediction(self, self._steps)

    def chunk(self, engine, feed):
        """The operation `(args, count) -> rows, results` for an engine and feeds of one kind and shape."""
        key = (engine, feed.kind, *((*a.shape, a.dtype) for a in tf.nest.flatten(feed.args)))
        if key not in self._chunks:
            traced = step = self.traced(engine in COMPILED)  # before the loop: its layout says how wide the rows are
            if engine == "jit":
                step = tf.function(lambda *tensors: traced(*tensors), autograph=False, jit_compile=True)
            together = TOGETHER_ON_GPU if engine == "scan" and on_gpu() else 1
            body = functools.partial(self._chunk, step, feed.kind, feed.capacity, together)
            if engine == "scan":
                body = tf.function(body, autograph=False, jit_compile=True)
            function = tf.function(lambda args, count: body(args, count), autograph=False)
            self._chunks[key] = Operation(function.get_concrete_function(feed.args, tf.constant(feed.count)))
        return self._chunks[key]

    def _chunk(self, step, feed_kind, capacity, together, args, count):
        def one(i, rows):
            row = step(*batch_of(feed_kind, args, i))
            return i + 1, tf.tensor_scatter_nd_update(rows, [[i]], [row])

        def several(i, rows):
            return tf.while_loop(lambda j, *_: j < together, lambda j, *at: (j + 1, *one(*at)), (0, i, rows))[1:]

        at = tf.constant(0), tf.zeros((capacity, self.layout.width), self.dtype)
        if 1 < together <= capacity:
            at = tf.while_loop(lambda i, _: i <= count - together, several, at)
        _, rows = tf.while_loop(lambda i, _: i < count, one, at)
        return rows, self.results()

    def stream(self, capacity):
        """The chunk over a tf.data iterator, as a `Stream`."""
        key = ("graph", "iterator", capacity)
        if key not in self._chunks:
            self._chunks[key] = Stream(self, capacity)
        return self._chunks[key]


class Stream:
    """A chunk that reads a tf.data iterator in the loop, and keeps its rows in a variable.

    So that they are there when the iterator, or a step, raises an error in the middle.
    """

    def __init__(self, program, capacity):
        self._step = program.traced()  # before the rows are made: its layout says how wide they are
        self._rows = plain_variable(tf.zeros((capacity, program.layout.width), program.dtype))
        self._done = plain_variable(0)
        self._run = tf.function(self._loop, autograph=False)

    def _loop(self, iterator, count):
        def body(i, _):
            batch = iterator.get_next_as_optional()

            def train():
                row = self._step(*flat(batch.get_value()))
                self._rows.scatter_nd_update([[i]], [row])
                self._done.assign(i + 1)
                return i + 1

            more = batch.has_value()
            return tf.cond(more, train, lambda: i), more

        tf.while_loop(lambda i, more: more & (i < count), body, (tf.constant(0), tf.constant(True)))

    def __call__(self, iterator, count):
        """Returns the rows, and the error that ended the chunk early, or `None`."""
        self._done.assign(0)
        error = None
        try:
            self._run(iterator, tf.constant(count))
        except tf.errors.OpError as raised:
            error = raised
        return self._rows.numpy()[: int(self._done.numpy())], error


class SingleStep:
    """A step that stands alone, compiled as one operation: metric objects begin anew, and what they say comes with
    the row."""

    def __init__(self, program, steps):
        step = program.traced()  # before the results: its layout says what they are
        self._steps = steps
        self._metrics = steps.metrics_to_reset()

        def alone(*tensors):
            for metric in self._metrics:
                metric.reset_state()
            return step(*tensors), program.results()

        self._run = Operation(tf.function(alone, autograph=False).get_concrete_function(*flat(program.spec)))

    def __call__(self, tensors):
        """Returns the row and the results as arrays."""
        self._steps.reset_metrics(but=self._metrics)
        row, results = self._run(*tensors)
        return row.numpy(), results.numpy()


class Prediction:
    """A step that predicts, compiled as one operation. Metric objects that `call` updates are as they were after it."""

    def __init__(self, program, steps):
        function = tf.function(program.predict_eagerly, autograph=False).get_concrete_function(*flat(program.spec))
        taken = {id(t) for t in function.captured_inputs}
        self._changed = [v for v in steps.metric_variables() if id(v.handle) in taken]
        self._run, self._structure = Operation(function), function.structured_outputs

    def __call__(self, tensors):
        with untouched(self._changed):
            return packed(self._structure, self._run(*tensors), expand_composites=True)


@contextlib.contextmanager
def untouched(variables):
    """The variables are, afterwards, what they were before."""
    before = [v.numpy() for v in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            if not np.array_equal(variable.numpy(), value):  # assigning takes longer than reading
                variable.assign(value)


class Runner:
    """Runs chunks of steps: keeps a program for every kind of step and form of batch."""

    def __init__(self, steps):
        self._steps = steps
        self._programs = {}
        self._version = None
        self._latest = None, None, None  # kind, spec and program

    @contextlib.contextmanager
    def unchanging(self):
        """While this is open, the steps' version is not asked for again: that walks over the model."""
        before, self._version = self._version, self._steps.version
        self._latest = None, None, None
        try:
            yield
        finally:
            self._version = before
            self._latest = None, None, None

    def program(self, kind, spec):
        """The program for a kind of step and the structure of a batch."""
        if self._version is None:
            return self._program(kind, spec)
        known_kind, known_spec, program = self._latest
        if known_kind != kind or known_spec is not spec:
            program = self._program(kind, spec)
            self._latest = kind, spec, program
        return program

    def _program(self, kind, spec):
        absent = tuple(s is None for s in tf.nest.flatten(spec))
        structure = repr(tf.nest.map_structure(lambda _: 0, spec))
        key = (kind, structure, tuple(flat(spec)), absent, self._version or self._steps.version)
        if key not in self._programs:
            self._programs[key] = Program(self._steps, kind, spec)
        return self._programs[key]

    def build(self, kind, spec, first):
        """Makes all variables that steps need. `first()` gives a batch, for what cannot be built from its specs."""
        steps = self._steps
        if steps.steps_first(kind):
            with steps.stepping_first(kind):
                program = self.program(kind, spec)  # a trace that made variables TensorFlow makes again with them
                program.run_eagerly(as_tensors(flat(first()))) if steps.eager else program.step
        steps.build(first() if steps.needs_batch(kind) else spec, kind)

    def takes_blocks(self, engine, kind):
        """Whether streams come in blocks of batches, and are not read as an iterator within the program."""
        if engine == "graph" and kind == "train" and self._steps.guarded:
            return True  # a chunk may have to be made again
        # A conditional, which reading needs, fails in a loop of steps on several devices.
        return engine in COMPILED or (engine == "graph" and self._steps.replicated)

    def results(self, kind, spec):
        """What metric objects say now, by name."""
        program = self.program(kind, spec)
        return named(program, program.read_results())

    def run(self, engine, kind, feed, first):
        """Runs a feed's batches. `first` is the number of updates completed before.

        Returns a `Record`, with the error that ended the chunk early, if the steps before it are in the record.
        """
        program = self.program(kind, feed.spec)
        if engine == "eager":
            return self._run_eagerly(program, feed, first)
        if feed.kind == "iterator":
            rows, error = program.stream(feed.capacity)(feed.args[0], feed.count)
            if error is not None and not len(rows):
                raise error
            return record(program, first, rows, program.read_results(), error)
        rows, results = program.chunk(engine, feed)(feed.args, tf.constant(feed.count))
        return record(program, first, rows.numpy()[: feed.count], results.numpy())

    def _run_eagerly(self, program, feed, first):
        rows = []
        for i in range(feed.count):
            if feed.kind == "iterator":
                batch = feed.args[0].get_next_as_optional()
                if not batch.has_value():
                    break
                tensors = flat(batch.get_value())
            else:
                tensors = batch_of(feed.kind, feed.args, i)
            rows.append(program.run_eagerly(tensors).numpy())
        if not rows:
            return Record(None, first, np.zeros((0, 1)), {})
        return record(program, first, np.stack(rows), program.results().numpy())

    def run_batch(self, kind, spec, batch, eager):
        """One step on the flat tensors of a batch, with metric objects that begin anew. Returns its `Record`."""
        program, tensors = self.program(kind, spec), as_tensors(batch)
        first = int(self._steps.updates.numpy())
        if eager:
            self._steps.reset_metrics()
            row = program.run_eagerly(tensors)
            return record(program, first, row.numpy()[None], program.results().numpy())
        row, results = program.alone(tensors)
        return record(program, first, row[None], results)

    def predict(self, spec, batch, eager):
        """The predictions for the flat tensors of a batch. They change no metric object."""
        program, tensors = self.program("predict", spec), as_tensors(batch)
        if not eager:
            return program.prediction(tensors)
        with untouched(self._steps.metric_variables()):
            return program.predict_eagerly(*tensors)


def as_tensors(batch):
    return [t if isinstance(t, COMPOSITE) else tf.convert_to_tensor(t) for t in batch]


def record(program, first, rows, results, error=None):
    return Record(program.layout, first, rows, named(program, results), error)


def named(program, results):
    return {r.name: float(v) for r, v in zip(program.layout.results, results, strict=True)}
