"""Finite differences: the gradient of a NumPy function from its values alone.

Central differences in float64: the error is of the order of the step squared. Every element of the
input costs two calls, or, where the function gives one value an example and no value depends on
another example, every element of one example does.
"""

import numpy as np

# Step relative to |x|, and the |x| below which it no longer shrinks (so that a probability of 1e-7
# stays positive). The second pair is for functions that compute in less than float64 themselves.
FINE = (1e-5, 1e-3)
COARSE = (5e-3, 1e-1)


def gradient(fn, arrays, index, upstream):
    """The gradient of `sum(upstream * fn(*arrays))` by `arrays[index]`, an array of its shape.

    `fn` gives a scalar or an array of shape (n,); `upstream` has the shape of what it gives.
    """
    arrays = [wide(a) for a in arrays]
    x, steps = arrays[index], steps_for(fn, arrays, index)

    def value(moved):
        return np.asarray(fn(*arrays[:index], moved, *arrays[index + 1 :]), "float64")

    upstream = np.asarray(upstream, "float64")
    if is_separable(value, x, steps, upstream.shape):
        return by_column(value, x, steps, upstream)
    return by_element(value, x, steps, upstream)


def calls(arrays, index, separable):
    """How often `fn` is called for one gradient."""
    size = arrays[index].size
    return 2 * (size // len(arrays[index]) if separable and size else size)


def wide(array):
    return array.astype("float64") if np.issubdtype(array.dtype, np.floating) else array


def steps_for(fn, arrays, index):
    """A step for every element, as coarse as the precision of what `fn` gives needs it."""
    is_fine = np.asarray(fn(*arrays)).dtype in ("float64", "int64", "bool")
    relative, floor = FINE if is_fine else COARSE
    return relative * np.maximum(np.abs(arrays[index]), floor)


def is_separable(value, x, steps, shape):
    """Whether `value` is of one number an example that depends on no other example's row of `x`.

    It is asked: every other row is moved, and the values of the rest must stay what they were.
    """
    if shape == () or x.shape[:1] != shape:
        return False
    moved = x.copy()
    moved[::2] += steps[::2]
    return np.array_equal(value(moved)[1::2], value(x)[1::2], equal_nan=True)


def by_column(value, x, steps, upstream):
    """Moves one element of every example at once."""
    result = np.empty_like(x)
    for place in np.ndindex(x.shape[1:]):
        column = (slice(None), *place)
        up, down = x.copy(), x.copy()
        up[column] += steps[column]
        down[column] -= steps[column]
        result[column] = upstream * (value(up) - value(down)) / (up - down)[column]
    return result


def by_element(value, x, steps, upstream):
    """Moves one element at a time."""
    result = np.empty_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += steps[place]
        down[place] -= steps[place]
        change = (value(up) - value(down)) / (up[place] - down[place])
        result[place] = np.sum(upstream * change)
    return result
