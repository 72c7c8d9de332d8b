"""Parametrisation: raw weight -> effective weight of the same shape, computed in the step.

The raw weight is the variable that the optimizer moves. The effective weight is what the layer computes
with, so the gradient passes through the map. A parametrisation may have state of its own (`u`, `g`), which
is saved with the layer that has the weight.
"""

import functools
import inspect
import re

import keras
import tensorflow as tf

from tfloop import _keras
from tfloop.step import current_step

PLAIN = str, int, float, bool, type(None)


class Parametrization(keras.layers.Layer):
    """Base class of the maps from a raw weight to an effective weight.

    A subclass overrides `call`, and `build` if it has state. Given to a layer, an instance is a pattern:
    each weight gets a copy with state of its own, made with the same arguments. Register the class with
    `keras.saving.register_keras_serializable` so that files restore it; `get_config` is needed where an argument of
    `__init__` is no number, string, bool or `None`.

    `call(raw, training=False)`: `raw` is a tensor of float32 (float64 if the variable is), in the shape of
    the variable; the result has that shape. `training` is true in a training step, if the weight is
    trained: only then may state move. The result may depend on state, which is taken as constant or, if
    trainable, trained.

    ```python
    class Positive(tfloop.Parametrization):
        def call(self, raw, training=False):
            return ops.exp(raw)

        def start(self, weight):
            return np.log(np.maximum(weight, 1e-3)), {}

    layer = tfloop.Parametrized(layers.Dense(2), {"kernel": Positive()})
    assert layer(np.ones((1, 3), "float32")).numpy().min() > 0
    ```
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls) and not {"get_config", "from_config"} & set(vars(cls)):
            # What a base class says of its arguments does not hold for those of this one.
            for name in ("get_config", "from_config"):
                setattr(cls, name, vars(Parametrization)[name])

    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls, *args, **kwargs)
        made.__dict__["_make"] = functools.partial(cls, *args, **kwargs)
        return made

    def __init__(self):
        super().__init__(dtype="float32", autocast=False)

    def __call__(self, raw, training=False):
        """As `call`. A weight is no input: Keras' own `__call__` would cast it and record a layer's output."""
        if "training" in self.call_signature_parameters:
            return self.call(raw, training=training)
        return self.call(raw)

    def bind(self, layer, variable):
        """Told before `build` to which layer and variable the weight belongs."""

    def build(self, shape):
        """Makes the state for a weight of this shape, by `add_state`."""
        self.built = True

    def call(self, raw, training=False):
        raise NotImplementedError(f"{type(self).__name__} has no call(raw, training=False).")

    def start(self, weight):
        """What gives an effective weight equal to `weight`, or near it: `(raw weight, {name: state})`.

        Takes and gives NumPy arrays; used once, when attached. Without a right inverse the raw weight stays.
        """
        return weight, self.warm_start(weight)

    def warm_start(self, raw):
        """The non-trainable state that fits this raw weight, as `{name: array}`."""
        return {}

    def get_config(self):
        """The arguments of `__init__`, by default as they were given.

        Raises `ValueError` if one is nothing that a file can hold as it is.
        """
        given = arguments(self)
        if not all(isinstance(leaf, PLAIN) for leaf in keras.tree.flatten(given)):
            raise ValueError(
                f"{type(self).__name__} was made with {given}, which a file cannot hold as it is: define get_config "
                "(and from_config), as for a Keras layer."
            )
        return given

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def fresh(self):
        """A copy without state.

        Raises `TypeError` if it was made with a layer or a variable, which the copies would share, and its class has
        no `get_config` that says how to make them.
        """
        if type(self).get_config is not Parametrization.get_config:
            return type(self).from_config(self.get_config())
        given = keras.tree.flatten(arguments(self))
        if any(isinstance(leaf, keras.Operation | keras.Variable | tf.Variable) for leaf in given):
            raise TypeError(
                f"{type(self).__name__} was made with a layer or a variable, which all weights would share: define "
                "get_config and from_config, which make one for each, or make it in `build`."
            )
        return self._make()

    @property
    def kind(self):
        """The class name in snake case, as in `--parametrize='*/kernel=spectral_norm'`."""
        return snake_case(type(self).__name__)

    def add_state(self, name, shape, initializer="zeros", trainable=False):
        """Makes a variable of the state and keeps it as the attribute `name`.

        Under a distribution strategy each replica keeps a non-trainable one for itself and moves it alike:
        that may be done anywhere in a step, where an update in all replicas at once may not.
        """
        if trainable:
            variable = self.add_weight(shape=shape, initializer=initializer, autocast=False, name=name)
        else:
            variable = keras.Variable(
                keras.initializers.get(initializer),
                shape=shape,
                dtype=self.variable_dtype,
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",
                synchronization="on_read",
                name=name,
            )
        setattr(self, name, variable)
        return variable

    def assign_state(self, state):
        for name, value in state.items():
            getattr(self, name).assign(value)

    def once_a_step(self, move):
        """Calls `move()`, which changes the state, unless it was called before in this tfloop step."""
        step = current_step()
        if step is None or _keras.in_stateless_scope():
            move()
        else:
            step.once((id(self), "state"), move)


def arguments(parametrization):
    """`name -> value` of what its `__init__` was called with. Raises `ValueError` for an argument without a name."""
    make = parametrization._make
    signature = inspect.signature(make.func.__init__)
    given = signature.bind(parametrization, *make.args, **make.keywords)
    given.apply_defaults()
    named = dict(list(given.arguments.items())[1:])
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL and not named[parameter.name]:
            del named[parameter.name]
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ValueError(
                f"{type(parametrization).__name__}.__init__ has arguments without a name: define get_config and "
                "from_config, as for a Keras layer."
            )
    return named


def reduced(shape, axis):
    """The axes over which a norm or mean is taken, checked: int, tuple or `None` for all."""
    rank = len(shape)
    axes = range(rank) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -rank <= a < rank for a in axes):
        raise ValueError(f"axis={axis} does not fit a weight of shape {tuple(shape)}.")
    return sorted({a % rank for a in axes})


def norm(x, axes):
    """Euclidean norm over the axes, kept as dimensions of size one. At zero its gradient is zero, not NaN."""
    largest = tf.stop_gradient(tf.reduce_max(tf.abs(x), axes, keepdims=True))
    zero = tf.equal(largest, 0)
    scale = tf.where(zero, tf.ones_like(largest), largest)  # the squares of large and small numbers are none
    squares = tf.reduce_sum(tf.square(x / scale), axes, keepdims=True)
    return tf.where(zero, tf.zeros_like(squares), scale * tf.sqrt(tf.where(zero, tf.ones_like(squares), squares)))


def divided(x, by):
    """`x / by`, and `x` itself where `by` is zero: for a norm of `x` that is zero too, with a finite gradient
    that can lead away from there."""
    return x / tf.where(tf.equal(by, 0), tf.ones_like(by), by)


def snake_case(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
