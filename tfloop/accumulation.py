"""Gradients of several batches gathered into one update: their mean, weighted by the number of examples."""

import tensorflow as tf


class Accumulation:
    """What the batches of one update share while they are gone through, one after the other.

    Args:
        sizes: numbers of examples of the batches.

    It stands before an optimizer's `apply`: `accumulation(optimizer, gradients, variables)` keeps the gradients
    and gives `None`, which means no update, until the last batch; then it gives the weighted mean of all.
    """

    def __init__(self, sizes):
        self.memo = {}  # what happens once a step
        self._shares = [size / sum(sizes) for size in sizes]
        self._index = 0
        self._call = 0
        self._gathered = []  # one entry an update within the step: (optimizer, lists of gradients)

    def at_the_last(self):
        return self._index == len(self._shares) - 1

    def next_batch(self):
        self._index += 1
        self._call = 0

    def __call__(self, optimizer, gradients, variables):
        call, self._call = self._call, self._call + 1
        share = self._shares[self._index]
        if call == len(self._gathered):
            self._gathered.append((optimizer, [[] for _ in gradients]))
        known, lists = self._gathered[call]
        if known is not optimizer or len(lists) != len(gradients):
            raise ValueError(
                "compile(accumulate=...): the optimizers must be applied in the same order in every batch. "
                f"Update {call} was that of {known.name!r}, now it is that of {optimizer.name!r}."
            )
        for gathered, gradient in zip(lists, gradients, strict=True):
            if gradient is not None:
                gathered.append(scaled(gradient, share))
        return [total(gathered) for gathered in lists] if self.at_the_last() else None


def scaled(gradient, share):
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(scaled(gradient.values, share), gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(share, gradient.dtype)


def total(gradients):
    if not gradients:
        return None
    if all(isinstance(g, tf.IndexedSlices) for g in gradients):
        values, indices = tf.concat([g.values for g in gradients], 0), tf.concat([g.indices for g in gradients], 0)
        return tf.IndexedSlices(values, indices, gradients[0].dense_shape)
    return tf.add_n([tf.convert_to_tensor(g) for g in gradients])
