"""Streams: sources that can only be read, a `tf.data.Dataset` or batches made by Python.

Neither is addressable: to come to a step, those before it are read. An error of a stream is raised at its own
place, when the batches before it have been trained on.
"""

import functools
import itertools
import queue
import threading
import weakref

import numpy as np
import tensorflow as tf

from tfloop.loop import replay
from tfloop.loop.arrays import block_capacity
from tfloop.loop.feed import Feed, flat, packed, same_shapes, spec_of, stacked, warn_ran_out


class DatasetSource:
    """A `tf.data.Dataset` of batches: iterated inside the program, or stacked into blocks for a compiled chunk.

    With `goes_on`, epochs of `steps` batches begin where the last ended, else at the beginning of the dataset.
    """

    addressable = False
    read_before = False  # by another fit of this process

    def __init__(self, dataset, steps=None, goes_on=True):
        self.dataset = dataset
        cardinality = int(dataset.cardinality())
        if cardinality == 0:
            raise ValueError("The dataset is empty: its cardinality is 0. Expected at least one batch.")
        if cardinality < 0 and cardinality == tf.data.INFINITE_CARDINALITY and steps is None:
            raise ValueError("The dataset is infinite: say how long an epoch is, with steps_per_epoch=... or steps=...")
        self.length = cardinality if cardinality > 0 else None
        self.steps = steps or self.length
        self.spec = dataset.element_spec
        self._endless = self.endless = steps is not None and goes_on
        self._iterator = None
        self._first = []  # a batch that a trial has read from the iterator
        self._blocks = None

    def feeder(self, epoch, start=0, capacity=1, blocks=False):
        if blocks:
            return self._python().feeder(epoch, start, capacity)
        if self._iterator is None or not (self._endless or self._first):
            self._iterator = iter(self.dataset)
        elif not self._first and self.dataset.cardinality() != tf.data.INFINITE_CARDINALITY:
            ahead = self._iterator.get_next_as_optional()
            if ahead.has_value():
                self._first = [ahead.get_value()]
            else:  # the data ended where the last epoch did
                self._iterator = iter(self.dataset)
        first, self._first = self._first, []
        return _DatasetFeeder(self, self._iterator, first, start, capacity)

    def _python(self):
        if self._blocks is None:
            iterator, first = self._iterator, self._first
            goes_on = first or (self._endless and iterator is not None)
            opened = iter([itertools.chain(first, iterator)] if goes_on else [])
            self._blocks = PythonSource(lambda epoch: next(opened, self.dataset), self.steps, spec=self.spec)
            self._blocks.endless = self._endless
        return self._blocks

    def sample(self, count, capacity, blocks=False):
        """The first batch `count` times, for a trial. The batch is trained on later, in its turn."""
        if not self._first:
            self._iterator = iter(self.dataset)
            self._first = [next(self._iterator)]
        if blocks:
            return block_of(self._first * count, min(capacity, block_capacity(spec_of(self._first[0]))), self.spec)
        return repeated(self._first[0], count, self.spec, capacity)

    @functools.cached_property
    def nature(self):
        """What `replay.nature` says of the dataset."""
        return replay.nature(self.dataset)

    @property
    def rereadable(self):
        """Whether the same object gives the same batches again, as far as one can tell."""
        return self.nature != replay.RESHUFFLES

    @property
    def may_draw(self):
        """Whether Python may run when it is read, and draw from the global random numbers."""
        return self.nature == replay.UNKNOWN

    def skip_epoch(self, epoch):
        """Comes to the end of an epoch without reading it, where that is the same. Returns whether it is."""
        if self._endless or self.nature == replay.UNKNOWN:
            return False
        if self._iterator is None and self.nature == replay.RESHUFFLES:
            next(iter(self.dataset), None)  # draws its seeds here
        self._iterator, self._first = None, []  # what a trial read was of this epoch
        return True

    def restart(self):
        self._iterator = None


class _DatasetFeeder:
    def __init__(self, source, iterator, first, start, capacity):
        self._source, self._iterator, self._first = source, iterator, first
        self._left = None if source.steps is None else source.steps
        self._capacity = capacity
        self.ended = False
        for _ in range(start):
            next(iterator) if not self._first else self._first.pop()
            self._left = None if self._left is None else self._left - 1

    def take(self, limit):
        if self.ended or self._left == 0:
            return None
        if self._first:
            feed = repeated(self._first.pop(), 1, self._source.spec, self._capacity)
            if feed.kind == "batch" and self._left is not None:
                self._left -= 1
            return feed
        count = min(limit, self._capacity, limit if self._left is None else self._left)
        return Feed("iterator", (self._iterator,), count, self._source.spec, most=self._capacity)

    def took(self, count, asked):
        """The loop says how many of the batches of an iterator that it asked for were there."""
        if self._left is not None:
            self._left -= count
        if count < asked:
            self.ended = True
            if self._left:
                warn_ran_out(self._source.steps)
                self._source.restart()

    def close(self):
        pass


def repeated(batch, count, spec, capacity):
    """A feed that streams one batch `count` times, with element spec `spec`, so that no program is traced for it."""

    @tf.autograph.experimental.do_not_convert
    def widened(*leaves):
        known = [tf.compat.v1.placeholder_with_default(x, s.shape) for x, s in zip(leaves, flat(spec), strict=True)]
        return packed(spec, known)

    if not is_dense(batch):
        return Feed("batch", flat(batch), 1, spec)
    dataset = tf.data.Dataset.from_tensors(tuple(flat(batch))).map(widened).repeat()
    return Feed("iterator", (iter(dataset),), count, spec, most=capacity)


def block_of(batches, capacity, spec):
    """A feed of batches of one shape. Sparse and ragged batches come one by one."""
    if not all(isinstance(leaf, np.ndarray | tf.Tensor) for leaf in flat(batches[0])):
        return Feed("batch", flat(batches[0]), 1, spec)
    count = min(len(batches), capacity)
    return Feed("block", stacked(batches[:count], capacity), count, spec)


class PythonSource:
    """Batches from Python: a generator, a `keras.utils.PyDataset`, a torch-style loader.

    Read ahead in a thread, a bounded number of batches. Several batches of equal shapes are stacked for one chunk.
    """

    addressable = False
    rereadable = True  # as far as one can tell
    may_draw = True
    whole = False  # whether an epoch ends where the data do
    read_before = False  # by another fit of this process
    ahead = 16  # batches

    def __init__(self, batches, steps=None, transform=None, spec=None, skip=None):
        """`batches(epoch)` gives the iterable of an epoch, or the same endless iterator every time.

        Where epochs go on where the last ended (`endless`), it is called again when it ends, with the number of times.
        `skip(epoch)` does what reading an epoch's batches would, beside giving them, if there is such a thing.
        """
        self._batches = batches
        self._transform = transform or (lambda batch: batch)
        self.steps = steps
        self._skip = skip
        self.endless = False
        self._passes = 0
        self._iterator, self._opened = None, None  # of the pass that was begun, and the epoch it is of
        self._stream = None
        self._peeked = []
        self._spec = self.given_spec = spec

    @classmethod
    def of_iterator(cls, iterator, steps, transform=None):
        source = cls(lambda epoch: iterator, steps, transform)
        source.endless = True
        source.rereadable = False
        return source

    def grouped(self, group, steps):
        """The source of what `group` makes of the batches of each epoch."""
        made = PythonSource(lambda epoch: group(map(self._transform, self._batches(epoch))), steps, skip=self._skip)
        made.endless, made.rereadable, made.whole = self.endless, self.rereadable, self.whole
        return made

    @property
    def spec(self):
        if self._spec is None:
            self._spec = spec_of(self._peek())
        return self._spec

    def _peek(self):
        if not self._peeked:
            self._begin(0)
            first = next(self._stream or self._iterator, None)
            if first is None:
                raise ValueError("The data are empty: the generator or loader gave no batch.")
            self._peeked = [first]
        return self._peeked[0]

    def _begin(self, epoch):
        if self._iterator is None:
            self._iterator = map(self._transform, iter(self._batches(self._passes if self.endless else epoch)))
            self._passes += 1
            self._opened = epoch

    def _open(self, epoch):
        """Reads ahead from now on, and not while the model is built: both may draw from the same random numbers."""
        self._begin(epoch)
        if self._stream is None:
            self._stream = ReadAhead(self._iterator, self.ahead)

    def sample(self, count, capacity, blocks=True):
        """A block of the first batch `count` times, for a trial. The batch is trained on later, in its turn."""
        return block_of([self._peek()] * count, min(capacity, block_capacity(self.spec)), self.spec)

    def feeder(self, epoch, start=0, capacity=1, blocks=False):
        if self._skip is not None and not self.endless and self._opened != epoch:
            self.close(ended=True)  # one was looked into, and training begins with a later one
            self._peeked = []
        self._open(epoch)
        if self.endless and not self._peeked:
            ahead = next(self._stream, None)
            if ahead is None:  # the data ended where the last epoch did
                self.close(ended=True)
                self._open(epoch)
            else:
                self._peeked = [ahead]
        stream = itertools.chain(self._peeked, self._stream)
        self._peeked = []
        return _PythonFeeder(self, stream, start, capacity)

    def skip_epoch(self, epoch):
        """Comes to the end of an epoch without reading it, where that is the same. Returns whether it is."""
        if self._skip is None or self.endless or self._iterator is not None:
            return False
        self._skip(epoch)
        return True

    def hold(self, batch):
        self._peeked = [batch]

    def close(self, ended):
        """At the end of an epoch: an endless stream goes on in the next one."""
        if ended or not self.endless:
            if self._stream is not None:
                self._stream.close()
            self._iterator = self._stream = None


class _PythonFeeder:
    def __init__(self, source, stream, start, capacity):
        self._source, self._stream = source, stream
        self._asked = capacity
        self._capacity = None  # known with the first batch
        self._first = None
        self._left = source.steps
        self._held = None
        self._error = None
        for _ in range(start):
            next(stream)
            self._left = None if self._left is None else self._left - 1

    def take(self, limit):
        if self._left == 0:
            if self._held is not None:
                self._source.hold(self._held)
            elif self._source.whole:
                next(self._stream, None)  # waits for what Python does at the end, before the next epoch begins
            self._source.close(ended=False)
            return None
        batches = self._read(limit)
        if not batches:
            if self._error is not None:
                raise self._error
            self._source.close(ended=True)
            if self._left:
                warn_ran_out(self._source.steps)
            return None
        if self._left is not None:
            self._left -= len(batches)
        return self._feed(batches)

    def _read(self, limit):
        batches = []
        while True:
            if (batch := self._next()) is None:
                break
            if batches and not same_shapes(batches[0], batch):
                self._held = batch
                break
            if self._capacity is None:
                self._first = batch
                self._capacity = min(self._asked, block_capacity(spec_of(batch))) if is_dense(batch) else 1
            batches.append(batch)
            if len(batches) >= min(limit, self._capacity, self._left or limit):
                break
        return batches

    def _feed(self, batches):
        regular = same_shapes(batches[0], self._first)
        spec = self._source.given_spec
        feed = block_of(batches, self._capacity if regular else len(batches), spec or spec_of(batches[0]))
        feed.short = not regular
        return feed

    def _next(self):
        if self._held is not None:
            batch, self._held = self._held, None
            return batch
        if self._error is not None:
            return None
        try:
            return next(self._stream, None)
        except Exception as error:  # raised when the batches before it have been trained on
            self._error = error
            return None

    def close(self):
        self._source.close(ended=True)


def is_dense(batch):
    return all(isinstance(leaf, np.ndarray | tf.Tensor) for leaf in flat(batch))


END = object()


def read(iterable, queued, closed):
    """Puts `(item, None)` for each item into a queue, and at the end `(END, None)` or `(None, error)`.

    No method of `ReadAhead`: the thread would keep it alive.
    """

    def put(entry):
        while not closed.is_set():
            try:
                queued.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in iterable:
            if not put((item, None)):
                return
    except BaseException as error:
        put((None, error))
    else:
        put((END, None))


def end_thread(closed, thread):
    """Ends a thread before the interpreter does: one that is within TensorFlow then can hang the process."""
    closed.set()
    if thread is not threading.current_thread():
        thread.join(1.0)


class ReadAhead:
    """Iterates in a thread, at most `ahead` items in front; an error comes out at its own place."""

    def __init__(self, iterable, ahead):
        self._queue = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._done = False
        thread = threading.Thread(target=read, args=(iterable, self._queue, self._closed), daemon=True)
        thread.start()
        weakref.finalize(self, end_thread, self._closed, thread)  # when nobody reads on, and at exit

    def __iter__(self):
        return self

    def __next__(self):
        if self._done:
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self._done = True
            raise error
        if item is END:
            self._done = True
            raise StopIteration
        return item

    def close(self):
        self._closed.set()
        self._done = True
