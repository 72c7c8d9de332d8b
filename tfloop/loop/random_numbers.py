"""Random numbers of a traced step: the same bits in every engine, and as fast under XLA as elsewhere.

TensorFlow's stateless random numbers have two faults under XLA on CPU (seen in 2.21). With the default algorithm
the key is derived anew for every element, which costs 20 to 50 times the number itself. And floats are made of
other bits of the random words than outside XLA, so that a compiled step draws other masks and other noise.

Here floats are made of integer words, which are the same everywhere, in the way in which TensorFlow's kernels
make them: uniform numbers and dropout masks have the bits of `tf.random.stateless_uniform` and
`tf.nn.experimental.stateless_dropout`, normal numbers are those of `tf.random.stateless_normal` up to rounding.
Truncated normal numbers are drawn by rejection outside XLA and not inside: fast here, but not the same there.

Keras looks these functions up when a layer draws. They are replaced while a step is traced, in its thread,
and at no other time.
"""

import contextlib
import functools
import math

import tensorflow as tf

from tfloop import _keras
from tfloop.step import current_step

PHILOX = "philox"

# dtype: (words of random bits, bits of the mantissa, exponent of 1.0)
FORMATS = {tf.float16: (tf.uint16, 10, 15), tf.bfloat16: (tf.uint16, 7, 127), tf.float32: (tf.int32, 23, 127)}


@contextlib.contextmanager
def same_everywhere():
    """While this is open, random numbers of steps traced in any thread are drawn as said above."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (tf.random, "stateless_uniform", uniform),
            (tf.random, "stateless_normal", normal),
            (tf.random, "stateless_truncated_normal", truncated_normal),
            (tf.nn.experimental, "stateless_dropout", dropout),
        ):
            stack.enter_context(_keras.patched(owner, name, functools.partial(in_traced_steps, replacement)))
        yield


def in_traced_steps(replacement, original):
    @functools.wraps(original)
    def draw(*args, **kwargs):
        if current_step() is None or tf.executing_eagerly():
            return original(*args, **kwargs)
        return replacement(original, *args, **kwargs)

    return draw


def uniform(original, shape, seed, minval=0, maxval=None, dtype=tf.float32, name=None, alg="auto_select"):
    dtype = tf.as_dtype(dtype)
    if alg != "auto_select":
        return original(shape, seed, minval, maxval, dtype, name, alg)
    if not dtype.is_floating:
        return original(shape, seed, minval, maxval, dtype, name, PHILOX)
    drawn = unit(original, shape, seed, dtype)
    if is_number(minval, 0) and (maxval is None or is_number(maxval, 1)):
        return tf.identity(drawn, name=name)
    low = tf.convert_to_tensor(minval, dtype)
    high = tf.convert_to_tensor(1 if maxval is None else maxval, dtype)
    return tf.add(drawn * (high - low), low, name=name)


def normal(original, shape, seed, mean=0.0, stddev=1.0, dtype=tf.float32, name=None, alg="auto_select"):
    dtype = tf.as_dtype(dtype)
    shape = tf.convert_to_tensor(shape, tf.int32)
    static = tf.get_static_value(shape)
    if alg != "auto_select" or dtype != tf.float32 or static is None:
        return original(shape, seed, mean, stddev, dtype, name, PHILOX if alg == "auto_select" else alg)
    count = math.prod(static)
    pairs = tf.reshape(unit(tf.random.stateless_uniform, [count + count % 2], seed, dtype), [-1, 2])
    # Box and Muller's transform; its first number of a pair is the sine's.
    radius = tf.sqrt(-2.0 * tf.math.log(tf.maximum(pairs[:, 0], 1e-7)))
    angle = (2 * math.pi) * pairs[:, 1]
    drawn = tf.reshape(tf.stack([radius * tf.sin(angle), radius * tf.cos(angle)], 1), [-1])
    drawn = tf.reshape(drawn[:count], shape)
    return tf.add(drawn * tf.cast(stddev, dtype), tf.cast(mean, dtype), name=name)


def truncated_normal(original, shape, seed, mean=0.0, stddev=1.0, dtype=tf.float32, name=None, alg="auto_select"):
    return original(shape, seed, mean, stddev, dtype, name, PHILOX if alg == "auto_select" else alg)


def dropout(original, x, rate, seed, rng_alg="auto_select", noise_shape=None, name=None):
    if rng_alg != "auto_select":
        return original(x, rate, seed, rng_alg, noise_shape, name)
    sampler = functools.partial(tf.random.stateless_uniform, seed=seed)
    return tf.nn.experimental.general_dropout(x, rate, sampler, noise_shape, name)


def is_number(value, number):
    return isinstance(value, int | float) and value == number


def unit(draw, shape, seed, dtype):
    """Numbers in [0, 1) from the low bits of random words, as TensorFlow's kernels outside XLA make them."""
    words = functools.partial(draw, shape, seed, minval=None, maxval=None, alg=PHILOX)
    if dtype == tf.float64:
        pairs = tf.bitcast(words(dtype=tf.uint64), tf.int64)
        low = tf.bitwise.right_shift(tf.bitcast(pairs, tf.uint64), tf.constant(32, tf.uint64))
        mantissa = tf.bitcast(low, tf.int64) | tf.bitwise.left_shift(pairs & 0xFFFFF, tf.constant(32, tf.int64))
        return tf.bitcast(mantissa | (1023 << 52), tf.float64) - 1
    kind, bits, exponent = FORMATS[dtype]
    mantissa = tf.bitcast(words(dtype=tf.uint32), tf.int32) & ((1 << bits) - 1)
    return tf.bitcast(tf.cast(mantissa | (exponent << bits), kind), dtype) - tf.ones((), dtype)
