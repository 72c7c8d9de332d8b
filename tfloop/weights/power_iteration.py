"""Power iteration for the largest singular value of linear maps.

An operator has `forward(w, u)` and `adjoint(w, v)`, linear in the weight and in the vector. The first
dimension of `u` and `v` counts blocks, which are maps of their own.
"""

import numpy as np
import tensorflow as tf


def power_iteration(operator, weight, u, iterations):
    """`iterations` times u <- M' M u / |M' M u|. A block whose map is zero keeps its `u`."""
    weight = tf.stop_gradient(weight)
    for _ in range(iterations):
        v = normalized(operator.forward(weight, u))
        u = normalized(operator.adjoint(weight, v), otherwise=u)
    return u


def sigma(operator, weight, u):
    """The estimate |M u| = v' M u of the largest singular value, v = M u / |M u|; the largest block's.

    Differentiable in the weight with u and v constant, so its gradient is v u'.
    """
    image = operator.forward(weight, tf.stop_gradient(u))
    v = tf.stop_gradient(normalized(image))
    return tf.reduce_max(tf.reduce_sum(v * image, axis=range(1, len(image.shape))))


def settled(operator, weight, u, tolerance=1e-4, most=1000):
    """Power iteration until ten iterations change the estimate by less than `tolerance`; at most `most`."""
    estimate = sigma(operator, weight, u)
    for _ in range(most // 10):
        u = power_iteration(operator, weight, u, 10)
        before, estimate = estimate, sigma(operator, weight, u)
        if abs(estimate - before) <= tolerance * estimate:
            break
    return u


def first_vector(shape, dtype="float32"):
    """A random vector of norm one in each block, the same at every call."""
    vectors = np.random.default_rng(0).standard_normal(shape)
    return normalized(tf.constant(vectors, dtype))


def normalized(x, otherwise=0.0):
    """`x` over its norm in each block; `otherwise` where `x` is zero."""
    axes = range(1, len(x.shape))
    largest = tf.reduce_max(tf.abs(x), axes, keepdims=True)
    scaled = tf.math.divide_no_nan(x, largest)  # the squares of small numbers would vanish
    length = tf.sqrt(tf.reduce_sum(scaled * scaled, axes, keepdims=True))
    return tf.where(largest > 0, tf.math.divide_no_nan(scaled, length), otherwise)
