"""A term: a named loss or metric. The registry holds a model's terms in order.

A term's value is a callable that takes the `Tensors` of the step (or nothing, for a loss), or a tensor that
`call` hands over. What becomes of the values in a step is the step's business (`model_step.py`).
"""

import dataclasses
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfloop import _keras, names
from tfloop.statistics import EXTREMES, Statistic, check_aggregation, get_statistic
from tfloop.step import current_step


@dataclasses.dataclass(frozen=True)
class Loss:
    name: str | None
    value: Callable
    weight: Any = 1.0  # float, a variable, or a function of the number of completed updates


@dataclasses.dataclass(frozen=True)
class Metric:
    name: str
    value: Callable
    aggregation: str = "mean"


@dataclasses.dataclass(frozen=True)
class Watch:
    pattern: str
    statistic: Statistic
    every: int = 1


class Terms:
    """The losses, metrics and watches of a model, in the order in which they were added.

    `version` counts changes, so that a step that was traced before one is traced again.
    """

    def __init__(self):
        self.losses: list[Loss] = []
        self.metrics: list[Metric] = []
        self.watches: list[Watch] = []
        self.version = 0
        self.trained = set()  # the terms that a training step had: evaluation may leave those out

    def __bool__(self):
        return bool(self.losses or self.metrics or self.watches)

    def add_loss(self, value, name, weight):
        check_name(name, "add_loss")
        if name is not None and any(term.name == name for term in self.losses):
            raise ValueError(two_losses_of_one_name(name))
        self.losses.append(Loss(name, value, check_weight(weight)))
        self.version += 1

    def add_metric(self, value, name, aggregation):
        if any(term.name == name for term in self.metrics):
            raise ValueError(two_of_one_name(name))
        self.metrics.append(Metric(name, value, aggregation))
        self.version += 1

    def watch(self, pattern, statistic, every):
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"watch({pattern!r}): expected a pattern, such as 'encoder/*' or 'gradients/*/kernel'.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"watch({pattern!r}, every={every!r}): expected a whole number of steps, 1 or more.")
        watch = Watch(pattern, get_statistic(statistic), every)
        if watch not in self.watches:
            self.watches.append(watch)
            self.version += 1


def takes_tensors(function):
    """Whether a callable wants the `Tensors`: it has one argument. Zero arguments are allowed too."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return True
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        raise TypeError(
            f"{label(function)} takes {len(required)} arguments. Expected one, the `Tensors` of the step, as in "
            "`lambda t: ops.mean(t['hidden'])`, or none."
        )
    return bool(required) or any(p.kind == p.VAR_POSITIONAL for p in parameters)


def evaluate(function, tensors):
    return function(tensors) if takes_tensors(function) else function()


def label(function):
    return getattr(function, "__name__", type(function).__name__)


def metric_name(value, name):
    """The name of a metric: the given one, else that of the function. A lambda has none."""
    name = name or getattr(value, "__name__", None)
    if not name or name == "<lambda>":
        raise ValueError(
            "A metric needs a name. Expected add_metric(value, name='mean_activation'), got "
            f"add_metric({value!r}) without one."
        )
    check_name(name, "add_metric")
    return name


def check_name(name, where):
    if name is not None and (not isinstance(name, str) or not name):
        raise TypeError(f"{where}: `name` must be a string, got {name!r} of type {type(name).__name__}.")


def check_weight(weight):
    """A number, a function, or a variable, which is read in every step."""
    if callable(weight) or (is_variable(weight) and len(weight.shape) == 0):
        return weight
    try:
        number = float(weight)
    except (TypeError, ValueError):
        raise TypeError(
            f"add_loss(weight={weight!r}): expected a number, a scalar variable, or a function of the number of "
            "completed updates."
        ) from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"add_loss(weight={weight!r}): expected a finite number.")
    return number


def is_variable(value):
    return isinstance(value, tf.Variable | keras.Variable)


def plain(value):
    """What a file can hold of a value: of a variable its number."""
    return float(value) if is_variable(value) else value


def two_losses_of_one_name(name):
    return f"add_loss(name={name!r}): the model already has a loss of this name. Choose another."


def two_of_one_name(name):
    return (
        f"Please provide different names for the metrics you have added: there is already a metric named {name!r} here."
    )


def mean_scalar(value, what):
    """A loss value as a float scalar: the mean over its elements, never their sum."""
    value = as_number(value, what)
    if not value.dtype.is_floating:
        value = tf.cast(value, keras.config.floatx())
    if value.dtype in (tf.float16, tf.bfloat16):
        value = tf.cast(value, tf.float32)
    return value if value.shape.rank == 0 else tf.reduce_mean(value)


def as_number(value, what):
    """The value as a tensor of numbers. Raises `TypeError` for what is not one."""
    if isinstance(value, keras.Metric):
        raise TypeError(
            f"{what}: got the metric object {value.name!r}. Expected the result of calling it, as in "
            f"add_metric(self.{value.name}(values)), or a tensor."
        )
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError):
        tensor = None
    if tensor is None or not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
        kind = f"a tensor of {tensor.dtype.name}" if tensor is not None else f"{value!r} of type {type(value).__name__}"
        raise TypeError(f"{what}: expected a number or a tensor of numbers, got {kind}.")
    return tensor


def weighted(value, weight, updates):
    """A loss, a float scalar, times its weight at a number of completed updates."""
    if callable(weight):
        weight = weight(tf.cast(updates, tf.float32))  # schedules count in floats, and TensorFlow does not promote
    if isinstance(weight, keras.Variable):
        weight = _keras.stored_value(weight)
    return value * tf.cast(weight, value.dtype)


def total(values):
    """The sum of float scalars: float64 if one of them is, else float32."""
    dtype = tf.float64 if any(v.dtype == tf.float64 for v in values) else tf.float32
    return tf.add_n([tf.cast(v, dtype) for v in values])


class TermMetric(keras.Metric):
    """The metric object that stands for an added metric in `model.metrics`.

    In plain calls it accumulates, as `add_metric` did in Keras 2: over the elements of every value it is given.
    In the loop its value is set from the record, once a chunk.
    """

    def __init__(self, name, aggregation="mean"):
        super().__init__(name=name, dtype="float32")
        self.aggregation = aggregation
        self._start = {"min": float("inf"), "max": float("-inf")}.get(aggregation, 0.0)
        self._recorded = None
        self.value = self.count = None  # made when a plain call needs them: the loop does not

    def update_state(self, value, sample_weight=None):
        """Accumulates a value in a plain call. In a tfloop step the record has it, and this does nothing."""
        if not hasattr(current_step(), "note_metric"):
            self.accumulate(value)

    def accumulate(self, value, examples=None):
        """Takes a value in: all its elements alike, or, with the batch's number of examples, their mean by that."""
        self._make_variables()
        self._recorded = None
        value = tf.cast(as_number(value, f"add_metric(name={self.name!r})"), tf.float32)
        if self.aggregation == "mean":
            count = tf.cast(tf.size(value) if examples is None else examples, tf.float32)
            self.value.assign_add(tf.math.multiply_no_nan(tf.reduce_mean(value), count))
            self.count.assign_add(count)
            return
        if self.aggregation == "sum":
            self.value.assign_add(tf.reduce_sum(value))
        elif self.aggregation == "last":
            self.value.assign(tf.reduce_mean(value))
        else:
            reduce = EXTREMES[self.aggregation]
            self.value.assign(reduce(tf.stack([self.value.value, reduce(value)])))
        self.count.assign_add(1.0)

    def _make_variables(self):
        if self.value is None:
            with tf.init_scope():
                start = keras.initializers.Constant(self._start)
                self.value = self.add_variable((), initializer=start, name="value")
                self.count = self.add_variable((), initializer="zeros", name="count")

    def result(self):
        if self._recorded is not None or self.value is None:
            return tf.constant(self._recorded or 0.0, tf.float32)
        if self.aggregation == "mean":
            return tf.math.divide_no_nan(self.value, self.count)
        return tf.where(self.count > 0, self.value, 0.0)

    def record(self, value):
        """Sets the value that `result()` gives, from the loop's record."""
        self._recorded = float(value)

    def reset_state(self):
        self._recorded = None
        if self.value is not None:
            self.value.assign(self._start)
            self.count.assign(0.0)


# Held here and not in the layers: Keras neither tracks these objects as state nor saves them (they are no part
# of a model's weights), and a layer that is built already may get one.
_term_metrics: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def term_metrics(owner):
    """The `TermMetric` objects of a layer or model, by name, in the order of their first occurrence."""
    return _term_metrics.setdefault(owner, {})


def term_metric(owner, name, aggregation="mean"):
    """The owner's `TermMetric` of that name, made if it does not exist yet."""
    found = term_metrics(owner)
    if name not in found:
        check_aggregation(aggregation, f"add_metric(name={name!r})")
        found[name] = TermMetric(name, aggregation)
    return found[name]


def versions(model):
    """What changes with the terms of a model and of those inside it."""
    return tuple((id(m), m._tfloop_terms.version) for _, m in names.walk(model) if hasattr(m, "_tfloop_terms"))


_NOTHING = Terms()


def registry(owner):
    """The terms registered on a model; none for anything else."""
    return getattr(owner, "_tfloop_terms", _NOTHING)


def losses_from_outside(owner):
    """The losses of a model that are known before a step: on symbolic tensors and functions."""
    symbolic = [
        Loss(extra["name"], value) for kind, value, extra in vars(owner).get("_tfloop_symbolic", ()) if kind == "loss"
    ]
    return [*symbolic, *registry(owner).losses]


def resets_its_variables(metric):
    """Whether resetting a metric object sets its variables and does nothing else: what Keras' own do."""
    parts = metric, *_keras.inner_metrics(metric)
    return all(getattr(m.reset_state, "__module__", "").startswith("keras.") for m in parts)


def all_metrics(model):
    """The metric objects of a model and everything below it, whatever an overridden `metrics` lists."""
    found = {id(m): m for m in _keras.compiled_metrics(model)}
    for _, layer in names.walk(model):
        if isinstance(layer, keras.layers.Layer):
            found |= {id(m): m for m in (*_keras.own_metrics(layer), *term_metrics(layer).values())}
    return list(found.values())
