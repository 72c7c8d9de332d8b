"""Accumulation: several batches that make one update, read as one large batch that the step takes apart again.

So a step stays an update: schedules, averages, checkpoints, rows and `every=n` count updates, and what is left at
the end of an epoch makes an update of its own.
"""

import itertools

import numpy as np
import tensorflow as tf

from tfloop.loop.arrays import ArraySource
from tfloop.loop.feed import batches_of
from tfloop.loop.streams import DatasetSource, PythonSource


def accumulated(source, count):
    """The source whose batches are `count` of the given one's, and the size of those, which the step takes at once."""
    if isinstance(source, ArraySource) and source.steps == source.batches:
        return ArraySource(source.data, source.batch_size * count, source.shuffle, source.seed), source.batch_size
    group = Groups(count, source.steps)
    if isinstance(source, ArraySource):  # an epoch may begin and end anywhere in a pass
        made = PythonSource(lambda epoch: group(batches_of(source.feeder(epoch))), group.steps, skip=lambda epoch: None)
        made.may_draw = source.may_draw
        return made, source.batch_size
    if isinstance(source, DatasetSource):
        made = PythonSource(lambda epoch: group(source.dataset.as_numpy_iterator()), group.steps)
        made.endless, made.rereadable, made.may_draw = source.endless, source.rereadable, source.may_draw
    else:
        made = source.grouped(group, group.steps)
    made.read_before = source.read_before
    return made, group.size_of_batches(made.spec)


class Groups:
    """Joins every `count` batches into one. What is left at the end of an epoch of `steps` batches makes one, too."""

    def __init__(self, count, steps):
        whole, rest = divmod(steps or count, count)
        self._sizes = [count] * whole + [rest] * (rest > 0)
        self.steps = None if steps is None else len(self._sizes)

    def __call__(self, batches):
        batches = iter(batches)
        for size in itertools.cycle(self._sizes):
            group = list(itertools.islice(batches, size))
            if not group:
                return
            yield tf.nest.map_structure(joined, *group)

    def size_of_batches(self, spec):
        """That of the batches that were joined into one of this spec, the first."""
        size = next(int(leaf.shape[0]) for leaf in tf.nest.flatten(spec) if leaf is not None)
        return -(-size // self._sizes[0])


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
