"""The effective weight: what a forward pass reads in place of a parametrised variable's raw weight.

A variable has a regulariser, a constraint and, here, a list of parametrisations, applied in order. Optimizers,
regularisers, constraints and files read and write the raw weight; only a running layer sees the effective one.
"""

import functools

import keras
import numpy as np
import tensorflow as tf

from tfloop import _keras, names
from tfloop.weights.forward import compute_dtype, current_forward_pass, effective_value, enter_at
from tfloop.weights.parametrization import Parametrization


class ParametrizedVariable(keras.Variable):
    """A Keras variable whose value, while a layer is called, is its effective weight.

    A variable that gets a parametrisation changes its class to this one. Reading is all that changes:
    scopes around the layer, replayed updates and losses added again are not needed, and what a layer
    assigns, adds or draws inside `call` goes where it always goes.
    """

    @property
    def value(self):
        forward = current_forward_pass()
        if forward is None or _keras.in_symbolic_scope():
            return super().value
        return _keras.autocast(self, forward.effective(self))

    @property
    def trainable(self):
        return super().trainable

    @trainable.setter
    def trainable(self, value):
        """The state of a weight is trained, and moves, if the weight does."""
        keras.Variable.trainable.fset(self, value)
        for parametrization in self.parametrizations:
            parametrization.trainable = value


def is_parametrized(variable):
    return isinstance(variable, ParametrizedVariable)


def attach(owner, variable, parametrizations, path, holder=None):
    """Gives a variable further parametrisations, applied after those that it has: `Attachment(...).finish()`."""
    Attachment(owner, variable, parametrizations, path, holder).finish()


class Attachment:
    """Further parametrisations for a variable, made for it and tried, but not given to it before `finish()`.

    Args:
        owner: the layer to which the variable belongs.
        variable: its weight, of a floating dtype.
        parametrizations: list of `Parametrization`, taken as patterns: the variable gets copies.
        path: the weight's name in messages.
        holder: the layer of which the state becomes a part, under names such as `kernel_spectral_norm/u`: a
            wrapper, which leaves the weights of what it wraps as they are, or by default the owner, so that
            state is trained, frozen and saved with the weight.
    """

    def __init__(self, owner, variable, parametrizations, path, holder=None):
        check(owner, variable, path)
        self._owner, self._variable, self._path, self._holder = owner, variable, path, holder
        self._old, self._new = list(getattr(variable, "parametrizations", ())), [p.fresh() for p in parametrizations]
        for parametrization in self._new:
            parametrization.dtype_policy = compute_dtype(variable.dtype)
            parametrization.bind(owner, variable)
            parametrization.build(tuple(variable.shape))
            parametrization.trainable = variable.trainable
        self._raw = None
        if _keras.is_initialized(variable):
            self._start()

    def _start(self):
        """Sets the state so that the effective weight is what it was, where that can be, and finds the raw weight."""
        with tf.init_scope():
            stored = numpy_value(self._variable, self._old)
            check_shape(stored, self._new, self._path)
            self._raw = stored, begin_at(stored, self._new)

    def finish(self):
        variable = self._variable
        _keras.when_initialized(variable, self._set_raw)
        for parametrization in self._new:
            prefix = variable.name if self._holder is None else self._path.replace("/", "_")
            hold(self._holder or self._owner, parametrization, prefix)
        variable.parametrizations = [*self._old, *self._new]
        variable.__class__ = ParametrizedVariable
        enter_at(self._owner)
        refuse_while_parametrized(self._owner, "quantize", NotImplementedError)  # which `Model.quantize` warns of
        refuse_while_parametrized(self._owner, "enable_lora", ValueError)

    def _set_raw(self):
        if self._raw is None:
            self._start()
        stored, raw = self._raw
        if raw is not stored:
            with tf.init_scope():
                self._variable.assign(begin_at(raw, self._old))


def hold(holder, parametrization, prefix):
    """Makes the state a part of the holder."""
    with _keras.unlocked(holder):
        setattr(holder, free_name(holder, f"{prefix}_{parametrization.kind}"), parametrization)


def refuse_while_parametrized(owner, method, error):
    """Lets a method that would write the effective weight over the raw one, or beside it, raise an error."""
    original = getattr(owner, method, None)
    if original is None or hasattr(original, "refuses_parametrized"):
        return

    @functools.wraps(original)
    def refusing(*args, **kwargs):
        found = [v.name for v in names.own_weights(owner) if is_parametrized(v)]
        if found:
            raise error(
                f"{method}: {names.listing(found)} of {owner.name!r} is parametrised. Call it on the layer of the "
                "plain model that tfloop.bake(model) gives."
            )
        return original(*args, **kwargs)

    refusing.__dict__["refuses_parametrized"] = True
    vars(owner)[method] = refusing


def detach(model):
    """Makes the parametrised weights below a model plain ones again; the raw weights stay."""
    variables = parametrized_weights(model).values()
    states = {id(p) for variable in variables for p in variable.parametrizations}
    for _, layer in list(names.walk(model)):
        for name, value in list(vars(layer).items()):
            if id(value) in states:
                _keras.untrack(layer, value)
                delattr(layer, name)
    for variable in variables:
        del variable.parametrizations
        variable.__class__ = keras.Variable


def begin_at(weight, parametrizations):
    """Sets the states of a list for an effective weight, and returns the raw weight that it wants."""
    for parametrization in reversed(parametrizations):
        weight, state = parametrization.start(weight)
        parametrization.assign_state(state)
    return weight


def warm_start_variable(variable):
    """Fits the non-trainable state (`u`) of a variable's parametrisations to its weight as it is now."""
    for index, parametrization in enumerate(variable.parametrizations):
        value = numpy_value(variable, variable.parametrizations[:index])
        parametrization.assign_state(parametrization.warm_start(value))


def numpy_value(variable, parametrizations):
    """The raw weight taken through some parametrisations, as an array of float32 or float64."""
    value = np.asarray(_keras.stored_value(variable))
    if parametrizations:
        value = effective_value(variable, parametrizations=parametrizations).numpy()
    return value.astype(np.promote_types(value.dtype if value.dtype.kind == "f" else "f4", "f4"), copy=False)


def check(owner, variable, path):
    if not keras.backend.is_float_dtype(variable.dtype):
        raise TypeError(f"{path!r} has dtype {variable.dtype}: only a weight of a floating dtype can be parametrised.")
    if type(variable) not in (keras.Variable, ParametrizedVariable):
        raise TypeError(f"{path!r} is a {type(variable).__name__}, which reads its value in its own way.")
    if getattr(owner, "lora_enabled", False):
        raise ValueError(
            f"{path!r}: {owner.name!r} has LoRA enabled, which adds to its kernel when used and when saved. "
            "Expected a layer without: make the layer anew with the merged kernel, and parametrise that."
        )


def check_shape(weight, parametrizations, path):
    value = weight
    for parametrization in parametrizations:
        value = tf.convert_to_tensor(parametrization(tf.constant(value)))
        if value.shape != weight.shape:
            raise ValueError(
                f"{type(parametrization).__name__} makes a weight of shape {tuple(value.shape)} from {path!r}, "
                f"whose shape is {weight.shape}: a parametrisation keeps the shape."
            )


def free_name(layer, name):
    """`name`, or `name_1`, `name_2`, ... where the layer has such an attribute."""
    candidate, count = name, 0
    while hasattr(layer, candidate):
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def owned_weights(model, terms=True):
    """`path -> (owner, variable)` for every weight below a model or layer that is no parametrisation's.

    `terms`: with those of layers that only losses and metrics need.
    """
    paths = {id(v): path for path, v in names.weight_names(model).items()}
    below = list(names.walk(model, terms))
    states = {id(s) for _, layer in below if isinstance(layer, Parametrization) for _, s in names.walk(layer)}
    return {paths[id(v)]: (owner, v) for _, owner in below if id(owner) not in states for v in names.own_weights(owner)}


def parametrized_weights(model):
    """`path -> variable` for the parametrised weights below a model or layer."""
    return {p: v for p, (_, v) in owned_weights(model).items() if is_parametrized(v)}
