"""Accumulation: several batches that make one update, read as one large batch that the step takes apart again.

So a step stays an update: schedules, averages, checkpoints, rows and `every=n` count updates, and what is left at
the end of an epoch makes an update of its own.
"""

import itertools

import numpy as np
import tensorflow as tf

from tfloop.loop.arrays import ArraySource
from tfloop.loop.streams import DatasetSource, PythonSource


def accumulated(source, count):
    """The source whose batches are `count` of the given one's, and the size of those, which the step takes at once."""
    steps = None if source.steps is None else -(-source.steps // count)
    if isinstance(source, ArraySource):
        explicit = steps if source.steps != source.batches else None
        size = source.batch_size
        return ArraySource(source.data, size * count, source.shuffle, source.seed, explicit), size
    if isinstance(source, DatasetSource):
        made = PythonSource(lambda epoch: groups(source.dataset.as_numpy_iterator(), count), steps)
        made.endless, made.rereadable, made.may_draw = source.endless, source.rereadable, source.may_draw
    else:
        made = source.grouped(lambda batches: groups(batches, count), steps)
    made.read_before = source.read_before
    sizes = [int(leaf.shape[0]) for leaf in tf.nest.flatten(made.spec) if leaf is not None]
    return made, -(-sizes[0] // count)


def groups(batches, count):
    """Joins every `count` batches into one; the last may be of fewer."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, count)):
        yield tf.nest.map_structure(joined, *group)


def joined(*leaves):
    return None if leaves[0] is None else np.concatenate([np.asarray(leaf) for leaf in leaves])


def micro_batches(data, size):
    """A batch, of a size known when the step is traced, as a list of batches of `size` examples and a rest."""
    leaves = [leaf for leaf in tf.nest.flatten(data) if leaf is not None]
    examples = leaves[0].shape[0]
    if examples is None:
        raise ValueError("compile(accumulate=...) needs batches whose size is known when the step is traced.")
    return [tf.nest.map_structure(part(slice(start, start + size)), data) for start in range(0, examples, size)]


def part(where):
    return lambda leaf: None if leaf is None else leaf[where]
