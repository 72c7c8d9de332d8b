"""Parametrising the weights of a whole model, by pattern, and what can be asked of it afterwards."""

import contextlib
import fnmatch
import functools

import keras
import tensorflow as tf

from tfloop import _keras, names
from tfloop.weights.catalogue import get_list
from tfloop.weights.effective import attach, owned_weights, parametrized_weights, warm_start_variable
from tfloop.weights.forward import effective_value, enter_at


def parametrize(model, pattern, parametrization):
    """Parametrises every weight of a model whose path matches, in place.

    Args:
        model: any Keras model or layer, built or not: functional, Sequential or subclassed.
        pattern: an `fnmatch` pattern of weight paths, such as `"discriminator/*/kernel"`; without a slash a
            pattern of variable names, such as `"kernel"`.
        parametrization: a `Parametrization`, its name (`"spectral_norm"`), a function of a tensor, or a list
            of these, applied in order. A weight that is parametrised already gets it in addition, after that.

    Returns the list of paths it matched. On a model that is not built it is applied when the model is, and
    the list is empty. The model must be compiled, or its optimizer built, after it if the parametrisation
    has trainable state.

    Raises `ValueError` when nothing matches (on a model that is not built: when it is), with the weights
    there are, and what the parametrisation raises.
    """
    parametrizations = get_list(parametrization)
    note(model, pattern, parametrizations)
    if model.built:
        return apply(model, pattern, parametrizations)
    apply_at_build(model, pattern, parametrizations)
    return []


def apply(model, pattern, parametrizations):
    weights = owned_weights(model)
    found = matching(weights, pattern)
    if not found:
        raise ValueError(
            f"parametrize({pattern!r}): no weight matches. {names.nearest(pattern, weights)} "
            f"The weights are {names.listing(weights)}."
        )
    for path in found:
        owner, variable = weights[path]
        attach(owner, variable, parametrizations, path)
    enter_above(model, [weights[path][1] for path in found])
    return found


def matching(paths, pattern):
    """The paths that a pattern means: with a slash by the whole path, without by the variable's name."""
    return [p for p in paths if fnmatch.fnmatchcase(p if "/" in pattern else p.split("/")[-1], pattern)]


def enter_above(model, variables):
    """Lets a forward pass begin at every layer that has one of these weights below it."""
    wanted = {id(v) for v in variables}
    for _, layer in names.walk(model):
        if isinstance(layer, keras.layers.Layer) and any(id(v) in wanted for v in layer.weights):
            enter_at(layer)


def apply_at_build(model, pattern, parametrizations):
    """Applies when the model is built, once."""
    original = model.build

    @functools.wraps(original)
    def build(*args, **kwargs):
        with outside_graph():
            original(*args, **kwargs)
            if vars(model).get("build") is build:
                vars(model)["build"] = original
            if waiting:
                waiting.clear()
                apply(model, pattern, parametrizations)

    waiting = [pattern]
    vars(model)["build"] = build


def outside_graph():
    """Where variables can be made and read: outside the `tf.function` being traced, if one is."""
    return contextlib.nullcontext() if _keras.in_stateless_scope() else tf.init_scope()


def note(model, pattern, parametrizations):
    """Keeps in the model what it was parametrised with, for `parametrization_config`."""
    noted = vars(model).setdefault("_tfloop_parametrizations", ())
    vars(model)["_tfloop_parametrizations"] = (*noted, (pattern, tuple(parametrizations)))


def parametrization_config(model):
    """What `parametrize` was called with on this model, in order, as data for `get_config`.

    Raises `ValueError` for a `Function` whose function is not registered with `keras.saving`.
    """
    return [
        {
            "pattern": pattern,
            "parametrization": [keras.saving.serialize_keras_object(p) for p in parametrizations],
        }
        for pattern, parametrizations in vars(model).get("_tfloop_parametrizations", ())
    ]


def restore_parametrizations(model, config):
    """Does again what `parametrization_config` says, on a model made from the same config."""
    for entry in config or ():
        deserialized = [keras.saving.deserialize_keras_object(c) for c in entry["parametrization"]]
        parametrize(model, entry["pattern"], deserialized)


def effective_weights(model):
    """`path -> tensor` for every parametrised weight: what the forward pass uses.

    In the dtype of the variable; no state is moved.
    """
    return {path: effective_value(variable) for path, variable in parametrized_weights(model).items()}


def warm_start(model):
    """Fits `u` to the weights as they are now, after they were set by hand.

    `u` is otherwise moved by training only, so weights from elsewhere would be divided by a sigma that is not
    theirs. Anything trained (`g` of `WeightNorm`) stays. Loading a file that holds `u` needs no warm start.

    ```python
    layer = tfloop.SpectralNormalization(layers.Dense(4))
    layer.build((None, 3))
    layer.layer.kernel.assign(np.eye(3, 4) * [1.0, 2.0, 3.0, 0.0])
    tfloop.warm_start(layer)
    np.testing.assert_allclose(np.linalg.norm(layer.effective_weights()["kernel"], 2), 1.0, rtol=1e-3)
    ```
    """
    for variable in parametrized_weights(model).values():
        warm_start_variable(variable)
