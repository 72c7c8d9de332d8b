"""Parametrising the weights of a whole model, by pattern, and what can be asked of it afterwards."""

import contextlib
import fnmatch
import functools
import json
import threading

import keras
import tensorflow as tf

from tfloop import _keras, names
from tfloop.weights.catalogue import get_list
from tfloop.weights.effective import Attachment, owned_weights, parametrized_weights, warm_start_variable
from tfloop.weights.forward import effective_value, enter_at


def parametrize(model, pattern, parametrization):
    """Parametrises every weight of a model whose path matches, in place.

    Args:
        model: any Keras model or layer, built or not: functional, Sequential or subclassed.
        pattern: an `fnmatch` pattern of weight paths, such as `"discriminator/*/kernel"`; without a slash a
            pattern of variable names, such as `"kernel"`.
        parametrization: a `Parametrization`, its name (`"spectral_norm"`), a function of a tensor, or a list
            of these, applied in order. A weight that is parametrised already gets it in addition, after that.

    Returns the list of paths it matched. On a model that is not built, nor all of its layers, it is applied when
    the model is, or before its own `train_step` makes the first update, and the list is empty. The model must be
    compiled, or its optimizer built, after it if the parametrisation has trainable state.

    Raises `ValueError` when nothing matches (on a model that is not built: when it is), with the weights
    there are, `TypeError` for a pattern that is no string, and what the parametrisation raises. The model
    is then what it was.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"parametrize({pattern!r}): expected one pattern, a string. Call it once for each.")
    given, entry = given_to(model), (pattern, tuple(get_list(parametrization)))
    if not (model.built or (has_built_layers(model) and matching(owned_weights(model), pattern))):
        if not given.waiting:
            apply_once_built(model)
        given.waiting.append(entry)
        return []
    apply_waiting(model)
    found = apply(model, *entry)
    given.applied.append(entry)
    return found


def has_built_layers(model):
    """Whether all layers below are built: a model is not, itself, if its own `train_step` only calls its parts."""
    below = [layer for _, layer in names.walk(model) if isinstance(layer, keras.layers.Layer) and layer is not model]
    return all(layer.built for layer in below)


class Given:
    """What a model was parametrised with, in order, as `(pattern, parametrisations)`; `waiting` until it has weights.

    No list in the model itself: what lies in its attributes are its layers.
    """

    def __init__(self):
        self.applied, self.waiting = [], []


def given_to(model):
    return vars(model).setdefault("_tfloop_parametrizations", Given())


def forget(model):
    """Lets `parametrization_config` know nothing of what the model was parametrised with."""
    vars(model).pop("_tfloop_parametrizations", None)


def apply(model, pattern, parametrizations):
    weights = owned_weights(model)
    found = matching(weights, pattern)
    if not found:
        raise ValueError(
            f"parametrize({pattern!r}): no weight matches. {names.nearest(pattern, weights)} "
            f"The weights are {names.listing(weights)}."
        )
    targets = [(path, *weights[path]) for path in found]
    attachments = [Attachment(owner, variable, parametrizations, path) for path, owner, variable in targets]
    for attachment in attachments:
        attachment.finish()
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


def are_waited_for(model):
    """Whether a parametrisation waits for the model's weights, and may add some of its own."""
    return bool(given_to(model).waiting)


def apply_waiting(model):
    """Applies what waited for the model's weights. What fails goes on waiting, so that no call passes it over."""
    given = given_to(model)
    with outside_graph():
        while given.waiting:
            apply(model, *given.waiting[0])
            given.applied.append(given.waiting.pop(0))


def apply_once_built(model):
    """Lets `apply_waiting` follow all that makes weights. `build` does, and Keras' own `build_from_config`, which does
    not call it; and where neither is called, because no symbolic call is possible, the first call."""
    given, original = given_to(model), model.call

    def followed(make):
        @functools.wraps(make)
        def made(*args, **kwargs):
            with outside_graph():
                make(*args, **kwargs)
            try:
                apply_waiting(model)
            except ValueError:
                if _keras.are_layers_built(model):
                    raise

        return made

    @functools.wraps(original)
    def call(*args, **kwargs):
        if given.waiting and not _keras.in_stateless_scope():
            if not _keras.are_layers_built(model):
                original(*args, **kwargs)  # makes the weights
            apply_waiting(model)
        return original(*args, **kwargs)

    vars(model).update(build=followed(model.build), build_from_config=followed(model.build_from_config), call=call)


def outside_graph():
    """Where variables can be made and read: outside the `tf.function` being traced, if one is."""
    return contextlib.nullcontext() if _keras.in_stateless_scope() else tf.init_scope()


def parametrization_config(model):
    """What `parametrize` was called with on this model, in order, as data for `get_config`.

    Raises `ValueError` for a `Function` whose function is not registered with `keras.saving`.
    """
    return [
        {
            "pattern": pattern,
            "parametrization": serialized(parametrizations),
        }
        for pattern, parametrizations in (*given_to(model).applied, *given_to(model).waiting)
    ]


def serialized(parametrizations):
    """A chain of parametrisations as data for `get_config`."""
    try:
        return [keras.saving.serialize_keras_object(p) for p in parametrizations]
    except ValueError:
        if not vars(_local).get("incomplete"):
            raise
        return []


@contextlib.contextmanager
def incomplete_configs():
    """While this is open, in this thread, what a file cannot say of parametrisations is left out of configs."""
    vars(_local)["incomplete"] = True
    try:
        yield
    finally:
        del vars(_local)["incomplete"]


_local = threading.local()


def restore_parametrizations(model, config):
    """Does what `parametrization_config` says on a model made from the same config, but for what its constructor did
    already."""
    done = [described(entry) for entry in parametrization_config(model)] if config else []
    for entry in config or ():
        if described(entry) in done:
            done.remove(described(entry))
            continue
        deserialized = [keras.saving.deserialize_keras_object(c) for c in entry["parametrization"]]
        parametrize(model, entry["pattern"], deserialized)


def described(entry):
    """An entry of `parametrization_config` as a file has it, without what differs from file to file."""
    chain = [(c["registered_name"], c["class_name"], c["config"]) for c in entry["parametrization"]]
    return json.dumps([entry["pattern"], chain], sort_keys=True, default=str)


def effective_weights(model):
    """`path -> tensor` for every parametrised weight: what the forward pass uses.

    In the dtype of the variable; no state is moved.
    """
    return {path: effective_value(variable) for path, variable in parametrized(model).items()}


def parametrized(model):
    """`path -> variable` for the parametrised weights below a model, of which some may have waited until now."""
    for _, layer in list(names.walk(model)):
        if "_tfloop_parametrizations" in vars(layer) and layer.built:
            apply_waiting(layer)
    return parametrized_weights(model)


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
    for variable in parametrized(model).values():
        warm_start_variable(variable)
