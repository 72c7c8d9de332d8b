"""Keeping: whether the numbers of a training step are finite, decided in the step.

The row of a step whose numbers are not has its number of examples negative: `loop/keeper.py` takes it back.
"""

import tensorflow as tf


def marked(row, finite):
    """The row of a step, marked if its numbers are not finite."""
    return tf.concat([tf.where(finite, row[:1], -row[:1]), row[1:]], 0)


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
    flat = tf.reshape(tensor, [-1, tf.shape(tensor)[-1]])
    return tf.matmul(tf.ones([1, tf.shape(flat)[0]], flat.dtype), flat)[0]
