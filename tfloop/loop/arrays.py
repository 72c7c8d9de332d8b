"""ArraySource: arrays of equal length, in batches, in an order that is a function of (seed, epoch).

Arrays that take a small part of the memory stay where the steps run, and are gathered by index there. Larger
ones, and `numpy.memmap`s, are gathered on the host, in a thread, one chunk ahead. Where there is a ragged or sparse
tensor among them, batches are picked one by one.
"""

import concurrent.futures
import functools

import keras
import numpy as np
import tensorflow as tf

from tfloop.loop.devices import resident_bytes
from tfloop.loop.feed import COMPOSITE, Feed, as_tensor, empty, flat, nbytes, padded, patiently, power_of_two

BLOCK_BYTES = 32 * 2**20  # of the batches of one chunk, where these are gathered on the host


class ArraySource:
    """See above.

    Args:
        data: `x`, `(x, y)` or `(x, y, sample_weight)` of arrays, as `keras.utils.pack_x_y_sample_weight` gives.
        batch_size: int.
        shuffle: whether to permute the examples (`"batch"`: the batches) anew in every epoch.
        seed: int.
        steps: steps an epoch, all of the data by default. Epochs then go on in the data where the last ended.
    """

    addressable = True
    rereadable = True
    may_draw = False
    read_before = False

    def __init__(self, data, batch_size=32, shuffle=False, seed=0, steps=None):
        self.data = data
        self.arrays = flat(data)
        self.examples = int(self.arrays[0].shape[0])
        if self.examples == 0:
            raise ValueError("The data are empty: the arrays have 0 examples. Expected at least one.")
        self.batch_size = min(batch_size, self.examples)
        self.shuffle, self.seed = shuffle, seed
        self.batches = -(-self.examples // self.batch_size)
        self.steps = steps or self.batches
        self.spec = self.spec_for(self.batch_size)
        self.resident = not can_gather(self.arrays) or not (
            any(isinstance(a, np.memmap) for a in self.arrays) or nbytes(self.arrays) > resident_bytes()
        )
        self._tensors = None

    def spec_for(self, size):
        return tf.nest.map_structure(lambda a: None if a is None else spec_of_rows(a, size), self.data)

    def tensors(self):
        """The arrays as tensors that stay where the steps run."""
        if self._tensors is None:
            self._tensors = [resident(a) for a in self.arrays]
        return self._tensors

    def order(self, epoch):
        """The order of the examples in a pass over the data, as int32 indices."""
        kind = np.int32 if self.examples < 2**31 else np.int64
        if not self.shuffle:
            return np.arange(self.examples, dtype=kind)
        generator = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, epoch]))
        if self.shuffle == "batch":
            whole = self.examples // self.batch_size
            batches = generator.permutation(whole) * self.batch_size
            rows = (batches[:, None] + np.arange(self.batch_size)).ravel()
            return np.append(rows, np.arange(whole * self.batch_size, self.examples)).astype(kind)
        return generator.permutation(self.examples).astype(kind)

    def indices(self, epoch, batch):
        """The examples in a batch."""
        at = epoch * self.steps + batch
        return Rows(self, at, at + 1).take(1)[0]

    def feeder(self, epoch, start=0, capacity=1, blocks=False):
        picking = any(isinstance(a, COMPOSITE) for a in self.arrays)
        made = PickingFeeder if picking else ResidentFeeder if self.resident else GatheringFeeder
        return made(self, epoch * self.steps + start, (epoch + 1) * self.steps, capacity)

    def sample(self, count, capacity, blocks=False):
        """A feed of the first batches, for a trial."""
        feeder = self.feeder(0, capacity=capacity)
        feed = feeder.take(count)
        feeder.close()
        return feed


class Rows:
    """Walks over the batches from one position to another: `take` gives rows of indices."""

    def __init__(self, source, position, end):
        self._source, self._position, self._end = source, position, end
        self._pass, self._order = None, None

    def take(self, limit):
        """Indices of at most `limit` batches of one size, `(batches, size)`, or `None` at the end."""
        source = self._source
        if self._position >= self._end:
            return None
        done, batch = divmod(self._position, source.batches)
        if done != self._pass:
            self._pass, self._order = done, source.order(done)
        size, whole = source.batch_size, source.examples // source.batch_size
        if batch >= whole:  # the short batch at the end of a pass
            self._position += 1
            return self._order[batch * size :][None]
        count = min(limit, whole - batch, self._end - self._position)
        self._position += count
        return self._order[batch * size : (batch + count) * size].reshape(count, size)


class ResidentFeeder:
    """Hands out the tensors and the rows to gather from them."""

    def __init__(self, source, position, end, capacity):
        self._source, self._capacity = source, capacity
        self._rows = Rows(source, position, end)

    def take(self, limit):
        """A feed of at most `limit` batches, or `None` at the end of the epoch."""
        rows = self._rows.take(min(limit, self._capacity))
        if rows is None:
            return None
        source, size = self._source, rows.shape[1]
        if size < source.batch_size:
            return Feed("rows", (source.tensors(), rows), 1, source.spec_for(size), short=True)
        return Feed("rows", (source.tensors(), padded(rows, self._capacity)), len(rows), source.spec)

    def close(self):
        pass


class PickingFeeder:
    """Picks batches one by one."""

    def __init__(self, source, position, end, capacity):
        self._source = source
        self._rows = Rows(source, position, end)

    def take(self, limit):
        rows = self._rows.take(1)
        if rows is None:
            return None
        source, size = self._source, rows.shape[1]
        batch = [picked(a, rows[0]) for a in source.arrays]
        return Feed("batch", batch, 1, source.spec_for(size), short=size < source.batch_size)

    def close(self):
        pass


class GatheringFeeder:
    """Gathers the batches of the next chunk while this one runs."""

    def __init__(self, source, position, end, capacity):
        self._source = source
        self._capacity = min(capacity, block_capacity(source.spec))
        self._rows = Rows(source, position, end)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "tfloop-gather")
        self._next = None  # a future of (block, count)
        self._left = None  # what a take left of a block

    def take(self, limit):
        block, count = self._left or self._gathered(min(limit, self._capacity))
        self._left = None
        if block is None:
            self.close()
            return None
        source, size = self._source, block[0].shape[1]
        used = min(count, limit)
        if used < count:
            self._left = [a[used:] for a in block], count - used
        elif self._next is None:
            self._next = self._thread.submit(self._gather, self._rows, min(limit, self._capacity))
        short = size < source.batch_size
        spec = source.spec_for(size) if short else source.spec
        if short:
            block = [a[:1] for a in block]
        elif len(block[0]) < self._capacity:  # what was left of a block
            block = [filled_up(a, self._capacity) for a in block]
        return Feed("block", [as_tensor(a) for a in block], used, spec, short)

    def _gathered(self, limit):
        if self._next is None:
            return self._gather(self._rows, limit)
        block, count = self._next.result()
        self._next = None
        return block, count

    def _gather(self, walk, limit):
        rows = walk.take(limit)
        if rows is None:
            return None, 0
        count, size = rows.shape
        capacity = self._capacity if size == self._source.batch_size else 1
        block = []
        for array in self._source.arrays:
            made = empty((capacity, size, *array.shape[1:]), dtype_of(array))
            patiently(functools.partial(take_rows, array, rows, made[:count]))
            block.append(made)
        return block, count

    def close(self):
        self._thread.shutdown(wait=False, cancel_futures=True)


def resident(array):
    """A tensor with what an array holds now. Copied once, where `tf.convert_to_tensor` has two copies for a while."""
    if not can_gather([array]):
        return tf.convert_to_tensor(array)
    made = empty(array.shape, dtype_of(array))
    made[...] = array
    return as_tensor(made)


def spec_of_rows(array, size):
    shape = size, *array.shape[1:]
    if isinstance(array, tf.RaggedTensor):
        return tf.RaggedTensorSpec(shape, array.dtype, array.ragged_rank, array.row_splits.dtype)
    return (
        tf.SparseTensorSpec(shape, array.dtype)
        if isinstance(array, tf.SparseTensor)
        else tf.TensorSpec(shape, dtype_of(array))
    )


def picked(array, rows):
    """The examples `rows` of an array, or of a ragged or sparse tensor, as a tensor of that kind."""
    if not isinstance(array, tf.SparseTensor):
        return tf.cast(tf.gather(array, rows), dtype_of(array))
    inside = array.indices.numpy()
    begins, ends = (np.searchsorted(inside[:, 0], rows, side) for side in ("left", "right"))
    counts = ends - begins
    entries = np.repeat(begins - np.append(0, np.cumsum(counts)[:-1]), counts) + np.arange(counts.sum())
    indices = inside[entries]
    indices[:, 0] = np.repeat(np.arange(len(rows)), counts)
    return tf.SparseTensor(indices, tf.gather(array.values, entries), (len(rows), *array.shape[1:]))


def filled_up(array, capacity):
    made = empty((capacity, *array.shape[1:]), array.dtype)
    made[: len(array)] = array
    return made


def take_rows(array, rows, out):
    """Copies `array[rows]` into `out`, reading no more of the array than that."""
    if array.dtype == out.dtype:
        np.take(array, rows.ravel(), 0, out=out.reshape(-1, *array.shape[1:]), mode="clip")
    else:
        out[...] = array[rows]


def block_capacity(spec):
    """How many batches a block on the host may hold: a power of two, so that few programs are compiled."""
    fitting = max(1, BLOCK_BYTES // max(1, nbytes(spec)))
    return min(256, power_of_two(fitting + 1) // 2)


def can_gather(arrays):
    return all(isinstance(a, np.ndarray) and a.dtype.kind in "fiub" for a in arrays)


def dtype_of(array):
    """What an array is in a batch: floats of 64 bits become Keras' floatx, as Keras has it."""
    if isinstance(array, np.ndarray) and array.dtype == np.float64:
        return keras.config.floatx()
    return array.dtype
