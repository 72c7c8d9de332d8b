"""Keeping: a training step whose numbers are not finite leaves nothing behind.

Whether a step is finite is decided in the step, from its losses and the gradients of its updates. If it is not,
every variable gets back what it held before: weights, moments, BatchNorm statistics, `u`, seeds, counters and
metrics. Zeroing the gradients would not do: moments, decay, statistics and counters would move all the same.

The row of a step that was taken back has its number of examples negative.
"""

import tensorflow as tf

from tfloop.plain import plain_variable


class Keeper:
    """Decides for each training step of a model whether it is kept.

    Args:
        variables: all that a step may change, `tf.Variable`s.
        halts: whether after one that is not, no further step is kept, until `begin` is called. The state then
            is what it was before that step, wherever in a chunk it was.
    """

    def __init__(self, variables, halts):
        self._variables = list(variables)
        self._halted = plain_variable(False, name="halted") if halts else None

    def begin(self):
        """Steps are kept from now on."""
        if self._halted is not None:
            self._halted.assign(False)

    def before(self):
        """The values as a step finds them, for `after`."""
        return [v.read_value() for v in self._variables]

    def after(self, values, row, kept):
        """Keeps the step, or takes it back. Returns its row."""
        if self._halted is not None:
            kept &= ~self._halted
            self._halted.assign(~kept)

        def take_back():
            for variable, value in zip(self._variables, values, strict=True):
                variable.assign(value)

        tf.cond(kept, lambda: None, take_back)
        return tf.concat([tf.where(kept, row[:1], -row[:1]), row[1:]], 0)


def losses(row, layout):
    """The values in a row that are losses, by their names."""
    is_loss = [c.width == 1 and (c.name == "loss" or c.name.endswith("_loss")) for c, _ in layout.slices()]
    return [row[place] for (_, place), told in zip(layout.slices(), is_loss, strict=True) if told]


def is_finite(values, gradients):
    """Whether losses and gradients are finite, and the sums of the gradients' columns.

    A sum by columns is a product with ones, which is far faster than a reduction under XLA on CPU, and is not
    finite if one of its terms is not.
    """
    parts = [tf.cast(v, tf.float32) for v in values]
    for gradient in gradients:
        dense = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        parts.append(tf.cast(column_sums(dense), tf.float32))
    return tf.reduce_all(tf.math.is_finite(tf.concat(parts, 0))) if parts else tf.constant(True)


def column_sums(tensor):
    if tensor.shape.rank is None or tensor.shape.rank < 2:
        return tf.reshape(tensor, [-1])
    flat = tf.reshape(tensor, [-1, tensor.shape[-1]])
    return tf.matmul(tf.ones([1, tf.shape(flat)[0]], flat.dtype), flat)[0]
