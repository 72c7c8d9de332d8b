"""A statistic: a named function of one tensor, for watching by pattern.

A statistic takes a tensor of any shape, cast to float32 unless it is float64 already, and gives a scalar
(`histogram`: counts). `aggregation` says how the values of the steps become the epoch's.
"""

import dataclasses
import inspect
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfloop import names

AGGREGATIONS = ("mean", "sum", "min", "max", "last")

# Histograms count on fixed edges, so that they work under XLA and add up over steps: symmetric about 0, five
# to a decade from 1e-6 to 1e4, and open at both ends.
_DECADES = np.logspace(-6, 4, 51)
HISTOGRAM_EDGES = np.concatenate([-_DECADES[::-1], [0.0], _DECADES]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Statistic:
    name: str
    function: Callable
    aggregation: str = "mean"
    width: int = 1  # of the value: 1 for a scalar, else the number of counts

    def __call__(self, tensor):
        """The value for a tensor; of a ragged one over the elements it has, of a sparse one over its zeros too."""
        if isinstance(tensor, tf.RaggedTensor):
            tensor = tensor.flat_values
        if isinstance(tensor, tf.SparseTensor):
            tensor = tf.sparse.to_dense(tf.sparse.reorder(tensor))
        tensor = tf.convert_to_tensor(tensor)
        if tensor.dtype not in (tf.float32, tf.float64):
            tensor = tf.cast(tensor, tf.float32)
        return self.function(tensor)


_registry: dict[str, Statistic] = {}


def register_statistic(function=None, name=None, aggregation="mean"):
    """Adds a statistic, as a decorator.

    Args:
        function: called with a float32 (or float64) tensor of any shape, gives a scalar.
        name: str, the function's own name by default.
        aggregation: `"mean"`, `"sum"`, `"min"`, `"max"` or `"last"`: how the epoch's value is made.

    Raises `ValueError` for a name that is taken, contains a `/`, or belongs to a lambda; and for an
    aggregation that does not exist.

    ```python
    @tfloop.register_statistic(name="share_above_one", aggregation="max")
    def share_above_one(tensor):
        return tf.reduce_mean(tf.cast(tensor > 1, tf.float32))
    ```
    """
    if function is None:
        return lambda f: register_statistic(f, name=name, aggregation=aggregation)
    name = name or getattr(function, "__name__", "<lambda>")
    if not name.isidentifier():
        raise ValueError(f"A statistic needs a name that is an identifier, got {name!r}: give `name=...`.")
    if name in _registry and not _same_source(_registry[name].function, function):
        raise ValueError(f"There is already a statistic {name!r}. Choose another name.")
    check_aggregation(aggregation, f"register_statistic({name!r})")
    _registry[name] = Statistic(name, function, aggregation)
    return function


def _same_source(one, other):
    """A notebook cell that is run again, or a module that is imported again, defines the same statistic."""
    where = [(getattr(f, "__module__", None), getattr(f, "__qualname__", None)) for f in (one, other)]
    return where[0] == where[1] and inspect.isfunction(other) and other.__name__ != "<lambda>"


def get_statistic(name):
    """The statistic of that name. Raises `ValueError` that lists what there is."""
    if name not in _registry:
        raise ValueError(f"There is no statistic {name!r}. There is {names.listing(_registry)}.")
    return _registry[name]


def check_aggregation(aggregation, where):
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"{where}: aggregation={aggregation!r} is unknown. Expected one of {names.listing(AGGREGATIONS)}."
        )


def smallest(t, axis=None):
    """The least of a float tensor's elements, NaN where one is: on CPUs XLA's minimum passes over NaN."""
    return _nan_if(tf.math.is_nan(t), tf.reduce_min(t, axis), axis)


def largest(t, axis=None):
    """The greatest of a float tensor's elements, NaN where one is."""
    return _nan_if(tf.math.is_nan(t), tf.reduce_max(t, axis), axis)


def _nan_if(any_of, value, axis):
    return tf.where(tf.reduce_any(any_of, axis), tf.constant(np.nan, value.dtype), value)


EXTREMES = {"min": smallest, "max": largest}


def _mean(t):
    return tf.reduce_mean(t)


def _rms(t):
    return tf.sqrt(_sum_of_squares(t) / tf.cast(tf.size(t), t.dtype))


def _norm(t):
    return tf.sqrt(_sum_of_squares(t))


def _sum_of_squares(t):
    return 2 * tf.nn.l2_loss(t)  # one pass over the tensor, where a square and a sum make two


def _std(t):
    return tf.math.reduce_std(t)


def _abs_mean(t):
    return tf.reduce_mean(tf.abs(t))


def _zeros(t):
    """The share of elements that are exactly zero."""
    return tf.reduce_mean(tf.cast(tf.equal(t, 0), t.dtype))


def _nonfinite(t):
    """The share of elements that are NaN or infinite."""
    return tf.reduce_mean(tf.cast(tf.logical_not(tf.math.is_finite(t)), t.dtype))


def _histogram(t):
    """How many elements lie between each two of `HISTOGRAM_EDGES`, the open ends included."""
    flat = tf.reshape(tf.cast(t, tf.float32), [-1])
    bucket = tf.searchsorted(HISTOGRAM_EDGES, flat, side="right")
    return tf.math.unsorted_segment_sum(tf.ones_like(flat), bucket, len(HISTOGRAM_EDGES) + 1)


for _name, _function, _aggregation in [
    ("mean", _mean, "mean"),
    ("rms", _rms, "mean"),
    ("norm", _norm, "mean"),
    ("min", smallest, "min"),
    ("max", largest, "max"),
    ("std", _std, "mean"),
    ("abs_mean", _abs_mean, "mean"),
    ("zeros", _zeros, "mean"),
    ("nonfinite", _nonfinite, "mean"),
]:
    _registry[_name] = Statistic(_name, _function, _aggregation)
_registry["histogram"] = Statistic("histogram", _histogram, "sum", width=len(HISTOGRAM_EDGES) + 1)
