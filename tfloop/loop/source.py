"""Source: where batches come from.

A source has `steps` an epoch (`None` where only reading tells), the `spec` of its batches, and a `feeder` for
every epoch, which hands out `Feed`s: one or more batches in the form in which a chunk of steps takes them. A
source that is `addressable` gives the batches of any (epoch, step) without reading those before.
"""

import dataclasses
import itertools
import queue
import threading
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfloop import names


@dataclasses.dataclass
class Feed:
    """Up to `count` batches for one chunk.

    `kind` says how a batch is had from `args` inside the program: `"rows"` (resident tensors and rows of
    indices), `"block"` (batches stacked) or `"iterator"` (a tf.data iterator, which may end early).
    `spec` is the structure of a batch, with a `tf.TensorSpec` for every tensor.
    """

    kind: str
    args: Any
    count: int
    spec: Any
    short: bool = False  # an epoch's last batch, smaller than the others


def batch_of(kind, args, i):
    """Batch `i` of a feed, inside the program: the flat list of its tensors."""
    if kind == "rows":
        arrays, rows = args
        return [tf.gather(a, rows[i]) for a in arrays]
    if kind == "block":
        return [a[i] for a in args]
    raise ValueError(kind)


def flat(structure):
    """The tensors of a batch in order, without the places that hold `None`."""
    return [leaf for leaf in tf.nest.flatten(structure) if leaf is not None]


def packed(spec, tensors):
    """The batch again, in the structure of `spec`, `None` where it has `None`."""
    tensors = iter(tensors)
    return tf.nest.pack_sequence_as(spec, [None if leaf is None else next(tensors) for leaf in tf.nest.flatten(spec)])


class ArraySource:
    """Arrays of equal length, in batches, in an order that is a function of (seed, epoch).

    Args:
        data: `x`, `(x, y)` or `(x, y, sample_weight)` of arrays, as `keras.utils.pack_x_y_sample_weight` gives.
        batch_size: int.
        shuffle: whether to permute the examples (`"batch"`: the batches) anew in every epoch.
        seed: int.
        steps: steps an epoch, all of the data by default. Epochs then go on in the data where the last ended.
    """

    addressable = True

    def __init__(self, data, batch_size=32, shuffle=False, seed=0, steps=None):
        self.data = data
        self.arrays = flat(data)
        self.examples = common_length(data)
        if self.examples == 0:
            raise ValueError("The data are empty: the arrays have 0 examples. Expected at least one.")
        self.batch_size = min(batch_size, self.examples)
        self.shuffle, self.seed = shuffle, seed
        self.batches = -(-self.examples // self.batch_size)
        self.steps = steps or self.batches
        self.spec = self._spec(self.batch_size)
        self._tensors = None

    def _spec(self, size):
        return tf.nest.map_structure(
            lambda a: None if a is None else tf.TensorSpec((size, *a.shape[1:]), a.dtype), self.data
        )

    def tensors(self):
        """The arrays as tensors that stay where the steps run."""
        if self._tensors is None:
            self._tensors = [tf.convert_to_tensor(a) for a in self.arrays]
        return self._tensors

    def order(self, epoch):
        """The order of the examples in a pass over the data, as int32 indices."""
        if not self.shuffle:
            return np.arange(self.examples, dtype=np.int32)
        generator = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, epoch]))
        if self.shuffle == "batch":
            whole = self.examples // self.batch_size
            batches = generator.permutation(whole) * self.batch_size
            rows = (batches[:, None] + np.arange(self.batch_size)).ravel()
            return np.append(rows, np.arange(whole * self.batch_size, self.examples)).astype(np.int32)
        return generator.permutation(self.examples).astype(np.int32)

    def feeder(self, epoch, start=0, capacity=1):
        return _ArrayFeeder(self, epoch * self.steps + start, (epoch + 1) * self.steps, capacity)


class _ArrayFeeder:
    def __init__(self, source, position, end, capacity):
        self._source, self._position, self._end = source, position, end
        self._capacity = capacity
        self._pass, self._order = None, None

    def take(self, limit):
        """A feed of at most `limit` batches, or `None` at the end of the epoch."""
        source = self._source
        if self._position >= self._end:
            return None
        done, batch = divmod(self._position, source.batches)
        if done != self._pass:
            self._pass, self._order = done, source.order(done)
        size = source.batch_size
        whole = source.examples // size
        if batch >= whole:  # the short batch at the end of a pass
            rows = self._order[batch * size :][None]
            self._position += 1
            return Feed("rows", (source.tensors(), rows), 1, source._spec(rows.shape[1]), short=True)
        count = min(limit, whole - batch, self._end - self._position, self._capacity)
        rows = self._order[batch * size : (batch + count) * size].reshape(count, size)
        self._position += count
        return Feed("rows", (source.tensors(), padded(rows, self._capacity)), count, source.spec)


class DatasetSource:
    """A `tf.data.Dataset` of batches. Not addressable: to come to a step, those before are read."""

    addressable = False

    def __init__(self, dataset, steps=None):
        self.dataset = dataset
        cardinality = int(dataset.cardinality())
        if cardinality == 0:
            raise ValueError("The dataset is empty: its cardinality is 0. Expected at least one batch.")
        if cardinality < 0 and cardinality == tf.data.INFINITE_CARDINALITY and steps is None:
            raise ValueError("The dataset is infinite: say how long an epoch is, with steps_per_epoch=... or steps=...")
        self.length = cardinality if cardinality > 0 else None
        self.steps = steps or self.length
        self.spec = dataset.element_spec
        self._endless = steps is not None
        self._iterator = None

    def feeder(self, epoch, start=0, capacity=1):
        if self._iterator is None or not self._endless:
            self._iterator = iter(self.dataset)
        return _DatasetFeeder(self, self._iterator, start, capacity)

    def restart(self):
        self._iterator = None


class _DatasetFeeder:
    def __init__(self, source, iterator, start, capacity):
        self._source, self._iterator = source, iterator
        self._left = None if source.steps is None else source.steps
        self._capacity = capacity
        self.ended = False
        for _ in range(start):
            next(iterator)
            self._left = None if self._left is None else self._left - 1

    def take(self, limit):
        if self.ended or self._left == 0:
            return None
        count = min(limit, self._capacity, limit if self._left is None else self._left)
        return Feed("iterator", (self._iterator,), count, self._source.spec)

    def took(self, count, asked):
        """The loop says how many of the batches that it asked for were there."""
        if self._left is not None:
            self._left -= count
        if count < asked:
            self.ended = True
            if self._left:
                warn_ran_out(self._source)
                self._source.restart()


def warn_ran_out(source):
    warnings.warn(
        "Your input ran out of data; the epoch ends early. Make sure that the dataset or generator gives at least "
        f"steps_per_epoch * epochs batches (here steps={source.steps}). You may need `.repeat()`.",
        stacklevel=2,
    )


class PythonSource:
    """Batches from Python: a generator, a `keras.utils.PyDataset`, a torch-style loader.

    Read ahead in a thread, a bounded number of batches; an error is raised at its own place. Several batches of
    equal shapes are stacked for one chunk.
    """

    ahead = 16  # batches
    block_bytes = 64 * 2**20

    def __init__(self, batches, steps=None, transform=None):
        """`batches(epoch)` gives the iterable of an epoch, or the same endless iterator every time."""
        self._batches = batches
        self._transform = transform or (lambda batch: batch)
        self.steps = steps
        self.addressable = False
        self._stream = None
        self._endless = False
        self._peeked = []
        self._spec = None

    @classmethod
    def of_iterator(cls, iterator, steps, transform=None):
        source = cls(lambda epoch: iterator, steps, transform)
        source._endless = True
        return source

    @property
    def spec(self):
        if self._spec is None:
            self._open(0)
            first = next(self._stream, None)
            if first is None:
                raise ValueError("The data are empty: the generator or loader gave no batch.")
            self._peeked = [first]
            self._spec = spec_of(first)
        return self._spec

    def _open(self, epoch):
        if self._stream is None:
            iterator = iter(self._batches(epoch))
            self._stream = ReadAhead(map(self._standard, iterator), self.ahead)

    def _standard(self, batch):
        return tf.nest.map_structure(as_array, self._transform(as_batch(batch)))

    def feeder(self, epoch, start=0, capacity=1):
        self._open(epoch)
        stream = itertools.chain(self._peeked, self._stream)
        self._peeked = []
        return _PythonFeeder(self, stream, start, capacity)

    def close(self, ended):
        """At the end of an epoch: an endless stream goes on in the next one."""
        if ended or not self._endless:
            if self._stream is not None:
                self._stream.close()
            self._stream = None


class _PythonFeeder:
    def __init__(self, source, stream, start, capacity):
        self._source, self._stream, self._capacity = source, stream, capacity
        self._left = source.steps
        self._held = None
        self._error = None
        for _ in range(start):
            next(stream)

    def take(self, limit):
        if self._left == 0:
            self._source._peeked = [] if self._held is None else [self._held]
            self._source.close(ended=False)
            return None
        limit = min(limit, self._capacity, limit if self._left is None else self._left)
        batches = []
        while len(batches) < limit:
            batch = self._next()
            if batch is None:
                break
            if batches and not same_shapes(batches[0], batch):
                self._held = batch
                break
            batches.append(batch)
            limit = min(limit, max(1, self._source.block_bytes // max(1, nbytes(batch))))
        if not batches:
            if self._error is not None:
                raise self._error
            self._source.close(ended=True)
            if self._left:
                warn_ran_out(self._source)
            return None
        if self._left is not None:
            self._left -= len(batches)
        block = [
            padded(np.stack(leaves), self._size(limit, len(batches)))
            for leaves in zip(*map(flat, batches), strict=True)
        ]
        return Feed("block", block, len(batches), spec_of(batches[0]))

    def _size(self, limit, count):
        """Blocks of few sizes, so that few programs are compiled."""
        return 1 if count == 1 else min(self._capacity, 1 << (count - 1).bit_length())

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


class ReadAhead:
    """Iterates in a thread, at most `ahead` items in front; an error comes out at its own place."""

    _END = object()

    def __init__(self, iterable, ahead):
        self._queue = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._read, args=(iterable,), daemon=True)
        self._thread.start()

    def _read(self, iterable):
        try:
            for item in iterable:
                if not self._put((item, None)):
                    return
        except BaseException as error:
            self._put((None, error))
        else:
            self._put((self._END, None))

    def _put(self, entry):
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self):
        return self

    def __next__(self):
        if self._done:
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self._done = True
            raise error
        if item is self._END:
            self._done = True
            raise StopIteration
        return item

    def close(self):
        self._closed.set()
        self._done = True


def make_source(x, y=None, sample_weight=None, batch_size=None, steps=None, shuffle=False, class_weight=None, seed=0):
    """The source for what a user gives to `fit`, `evaluate` or `predict`.

    Raises `ValueError` for arguments that do not go together and for data of a kind that is not known.
    """
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    if shuffle not in (True, False, "batch"):
        raise ValueError(f"shuffle={shuffle!r}: expected True, False or 'batch'.")
    transform = None if class_weight is None else weighing(class_weight)
    if isinstance(x, tf.data.Dataset | keras.utils.PyDataset) or is_iterable_of_batches(x):
        for name, value in (("y", y), ("sample_weight", sample_weight), ("batch_size", batch_size)):
            if value is not None:
                raise ValueError(
                    f"`{name}` cannot be given when `x` is a {type(x).__name__}: its batches hold inputs, targets and "
                    "weights, as `(x, y)` or `(x, y, sample_weight)`."
                )
    if isinstance(x, tf.data.Dataset):
        return DatasetSource(x if transform is None else x.map(lambda *b: transform(b if len(b) > 1 else b[0])), steps)
    if isinstance(x, keras.utils.PyDataset):
        return PythonSource(pydataset(x, shuffle, seed), steps or x.num_batches, transform)
    if hasattr(x, "__next__"):
        return PythonSource.of_iterator(x, steps, transform)
    if is_iterable_of_batches(x):
        return PythonSource(lambda epoch: x, steps or (len(x) if hasattr(x, "__len__") else None), transform)
    x, y, sample_weight = (
        None if part is None else standard_arrays(part, n)
        for part, n in ((x, "x"), (y, "y"), (sample_weight, "sample_weight"))
    )
    data = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
    common_length(data)
    if transform is not None:
        data = transform(data)
    return ArraySource(data, batch_size or 32, shuffle, seed, steps)


def pydataset(dataset, shuffle, seed):
    """`epoch -> iterator` over a PyDataset, in an order that is a function of (seed, epoch)."""

    def batches(epoch):
        dataset.on_epoch_begin()
        count = dataset.num_batches
        order = range(count) if count is not None else itertools.count()
        if shuffle and count is not None:
            order = np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch])).permutation(count)
        for i in order:
            yield dataset[int(i)]
        dataset.on_epoch_end()

    return batches


def is_iterable_of_batches(x):
    """A generator or a torch-style loader: iterable, and neither an array nor a structure of arrays."""
    if x is None or isinstance(x, list | tuple | dict | str | bytes) or hasattr(x, "shape") or hasattr(x, "__array__"):
        return False
    return hasattr(x, "__iter__")


def as_batch(batch):
    """Loaders like torch's give lists; Keras' batches are tuples."""
    return tuple(batch) if isinstance(batch, list) else batch


def standard_arrays(part, name):
    """A structure of arrays as NumPy arrays or tensors of the dtypes that Keras would use."""
    if isinstance(part, list | tuple) and not any(hasattr(i, "shape") or isinstance(i, dict) for i in part):
        if not part or all(is_plain(item) for item in part):
            part = np.asarray(part)
    if isinstance(part, dict):
        return {key: standard_arrays(value, f"{name}/{key}") for key, value in part.items()}
    if isinstance(part, list | tuple):
        found = [standard_arrays(value, f"{name}/{i}") for i, value in enumerate(part)]
        return type(part)(*found) if hasattr(part, "_fields") else type(part)(found)
    array = as_array(part)
    if getattr(array, "dtype", None) == object or not hasattr(array, "shape"):
        raise ValueError(
            f"`{name}` is of type {type(part).__name__}, which is no kind of data that can be trained on. Expected "
            "arrays, tensors, structures of them, a tf.data.Dataset, a PyDataset, a generator or a loader."
        )
    if len(array.shape) == 0:
        raise ValueError(f"`{name}` is a scalar, {part!r}. Expected an array with one entry an example.")
    return array


def is_plain(value):
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return isinstance(value, int | float | bool | np.generic)


def as_array(value):
    """NumPy arrays and tensors as they are, floats of 64 bits as Keras' floatx; the rest as NumPy arrays."""
    if value is None or isinstance(value, tf.Tensor | tf.RaggedTensor | tf.SparseTensor):
        return value
    if isinstance(value, tf.Variable | keras.Variable):
        return tf.convert_to_tensor(value)
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu().numpy()
    if hasattr(value, "to_numpy"):  # pandas
        value = value.to_numpy()
    if not isinstance(value, np.ndarray):
        value = np.asarray(value)
    return value.astype(keras.config.floatx()) if value.dtype == np.float64 else value


def common_length(data):
    """The number of examples. Raises `ValueError` that lists the lengths where they differ."""
    lengths = {n: leaf.shape[0] for n, leaf in leaves(data)}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{n}: {length}" for n, length in lengths.items())
        raise ValueError(f"All arrays must have the same number of examples. Got {given}.")
    if not lengths:
        raise ValueError("There are no data: `x` is None. Expected arrays, a dataset, a generator or a loader.")
    return int(next(iter(lengths.values())))


def leaves(data):
    """`(name, array)` of what `pack_x_y_sample_weight` gave."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

    def walk(name, part):
        if isinstance(part, dict):
            for key, value in part.items():
                yield from walk(f"{name}/{key}", value)
        elif isinstance(part, list | tuple):
            for i, value in enumerate(part):
                yield from walk(f"{name}/{i}", value)
        elif part is not None:
            yield name, part

    for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        yield from walk(name, part)


def weighing(class_weight):
    """A function that gives a batch the sample weights that its targets' classes have."""
    if not isinstance(class_weight, dict):
        raise ValueError(f"class_weight must be a dict from class index to weight, got {class_weight!r}.")
    size = max(class_weight, default=0) + 1
    table = np.ones(size, keras.config.floatx())
    for index, weight in class_weight.items():
        table[index] = weight

    def transform(data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is None or isinstance(y, dict | list | tuple):
            raise ValueError("class_weight needs one target with a class for every example.")
        if sample_weight is not None:
            raise ValueError("Give either class_weight or sample_weight, not both.")
        on_host = isinstance(y, np.ndarray)
        if len(y.shape) > 1 and y.shape[-1] != 1:
            classes = y.argmax(-1) if on_host else tf.argmax(y, -1)
        else:
            classes = y.reshape(len(y), -1)[:, 0].astype(int) if on_host else tf.cast(tf.reshape(y, [-1]), tf.int32)
        if on_host:
            weights = np.where(classes < size, table[np.minimum(classes, size - 1)], 1).astype(table.dtype)
        else:
            weights = tf.where(classes < size, tf.gather(table, tf.minimum(classes, size - 1)), 1.0)
        return keras.utils.pack_x_y_sample_weight(x, y, weights)

    return transform


def check_count(name, value):
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
        raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more.")


def split(x, y, sample_weight, share):
    """Divides arrays into a training part and a validation part, the last `share` of the examples."""
    if not 0 < share < 1:
        raise ValueError(f"validation_split={share!r}: expected a number between 0 and 1.")
    if isinstance(x, tf.data.Dataset | keras.utils.PyDataset) or is_iterable_of_batches(x):
        raise ValueError(f"validation_split is for arrays, not for a {type(x).__name__}: give validation_data.")
    parts = [
        None if p is None else standard_arrays(p, n) for p, n in ((x, "x"), (y, "y"), (sample_weight, "sample_weight"))
    ]
    total = common_length(keras.utils.pack_x_y_sample_weight(*parts))
    at = int(total * (1 - share))
    if at in (0, total):
        raise ValueError(f"validation_split={share!r} of {total} examples leaves one of the two parts empty.")
    first = [tf.nest.map_structure(lambda a: None if a is None else a[:at], p) for p in parts]
    last = [tf.nest.map_structure(lambda a: None if a is None else a[at:], p) for p in parts]
    return first, last


def padded(array, capacity):
    """The array with `capacity` entries, so that chunks of all lengths have one shape."""
    if len(array) == capacity:
        return array
    filled = np.zeros((capacity, *array.shape[1:]), array.dtype)
    filled[: len(array)] = array
    return filled


def same_shapes(one, other):
    return [(a.shape, a.dtype) for a in flat(one)] == [(a.shape, a.dtype) for a in flat(other)]


def nbytes(batch):
    return sum(int(np.prod(a.shape)) * a.dtype.size if hasattr(a.dtype, "size") else a.nbytes for a in flat(batch))


def spec_of(batch):
    return tf.nest.map_structure(lambda a: None if a is None else tf.TensorSpec(a.shape, a.dtype), batch)


def describe(source):
    return names.listing([type(source).__name__])
