"""Feed: one or more batches, in the form in which a chunk of steps takes them."""

import dataclasses
import time
import warnings
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from tfloop.loop.devices import on_gpu

PAUSES = (0.1, 0.5, 2.5)  # seconds, before data are read again
COMPOSITE = tf.RaggedTensor | tf.SparseTensor
ALIGNMENT = 64  # bytes: what TensorFlow asks of memory that it takes over without a copy


@dataclasses.dataclass
class Feed:
    """Up to `count` batches for one chunk.

    `kind` says how a batch is had from `args` inside the program: `"rows"` (resident tensors and rows of
    indices), `"block"` (batches stacked), `"batch"` (the tensors of one, ragged or sparse) or `"iterator"` (a
    tf.data iterator, which may end early).
    `spec` is the structure of a batch, with a `tf.TensorSpec` for every tensor.
    """

    kind: str
    args: Any
    count: int
    spec: Any
    short: bool = False  # an epoch's last batch, smaller than the others
    most: int = 1  # batches that an iterator may be asked for

    @property
    def capacity(self):
        """The most batches that a feed of this shape can hold."""
        if self.kind in ("iterator", "batch"):
            return self.most
        return int((self.args[1] if self.kind == "rows" else self.args[0]).shape[0])


def batch_of(kind, args, i):
    """Batch `i` of a feed, inside the program: the flat list of its tensors."""
    if kind == "rows":
        arrays, rows = args
        return [tf.gather(a, rows[i]) for a in arrays]
    if kind == "block":
        return [a[i] for a in args]
    if kind == "batch":
        return args
    raise ValueError(kind)


def batches_of(feeder):
    """The batches that a feeder has left, one by one, as host arrays or tensors."""
    while (feed := feeder.take(1)) is not None:
        if feed.kind == "iterator":
            batch = feed.args[0].get_next_as_optional()
            there = bool(batch.has_value())
            feeder.took(int(there), 1)
            if not there:
                return
            yield batch.get_value()
        else:
            yield packed(feed.spec, batch_of(feed.kind, feed.args, 0))


def flat(structure):
    """The tensors of a batch in order, without the places that hold `None`."""
    return [leaf for leaf in tf.nest.flatten(structure) if leaf is not None]


def packed(spec, tensors, expand_composites=False):
    """The tensors in the structure of `spec`, `None` where it has `None`."""
    tensors = iter(tensors)
    leaves = tf.nest.flatten(spec, expand_composites)
    return tf.nest.pack_sequence_as(spec, [None if s is None else next(tensors) for s in leaves], expand_composites)


def spec_of(batch):
    """The batch's structure with a `tf.TensorSpec`, or that of a ragged or sparse tensor, for every leaf."""
    return tf.nest.map_structure(lambda a: None if a is None else _spec_of(a), batch)


def _spec_of(leaf):
    return tf.type_spec_from_value(leaf) if isinstance(leaf, COMPOSITE) else tf.TensorSpec(leaf.shape, leaf.dtype)


def patiently(read):
    """`read()`, tried again where the operating system could not read: a network's file system may do better later."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            logging.warning("Reading data failed and is tried again in %.1f s: %r", pause, error)
            time.sleep(pause)
    return read()


def warn_ran_out(steps):
    warnings.warn(
        "Your input ran out of data; the epoch ends early. Make sure that the dataset or generator gives at least "
        f"steps_per_epoch * epochs batches (here steps={steps}). You may need `.repeat()`.",
        stacklevel=2,
    )


def same_shapes(one, other):
    return [(a.shape, a.dtype) for a in flat(one)] == [(a.shape, a.dtype) for a in flat(other)]


def nbytes(batch):
    """Bytes of a structure of arrays, tensors or specs; a dimension that is not known counts as one."""
    return sum(int(np.prod([n or 1 for n in a.shape], dtype=np.int64)) * tf.as_dtype(a.dtype).size for a in flat(batch))


def power_of_two(count):
    """The least power of two that is not below."""
    return 1 << max(count - 1, 0).bit_length()


def padded(array, capacity):
    """The array with `capacity` entries, so that chunks of all lengths have one shape."""
    if len(array) == capacity:
        return array
    filled = np.zeros((capacity, *array.shape[1:]), array.dtype)
    filled[: len(array)] = array
    return filled


def stacked(batches, capacity):
    """Batches of one shape as a block for `capacity` of them: one tensor for every leaf, each copied once."""
    blocks = []
    for leaves in zip(*map(flat, batches), strict=True):
        block = empty((capacity, *leaves[0].shape), np.asarray(leaves[0]).dtype)
        for place, leaf in zip(block, leaves, strict=False):
            place[...] = leaf
        blocks.append(as_tensor(block))
    return blocks


def empty(shape, dtype):
    """An array without values whose memory a tensor can take over."""
    dtype = np.dtype(dtype)
    if dtype.hasobject or dtype.itemsize == 0:  # strings
        return np.full(shape, b"", object)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def as_tensor(array):
    """A tensor, where steps run, of an array that nobody writes to any more: without a copy, where that can be.

    What a GPU finds in the machine's memory, a loop in a graph copies for every step.
    """
    if array.flags.c_contiguous and array.dtype.kind in "fiu" and array.ctypes.data % ALIGNMENT == 0 and array.size:
        tensor = tf.experimental.dlpack.from_dlpack(array.__dlpack__())
        return tf.identity(tensor) if on_gpu() else tensor
    return tf.convert_to_tensor(array)
