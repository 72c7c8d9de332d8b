"""Baking: a plain Keras model that has the effective weights as its weights."""

import warnings

import keras

from tfloop import _keras, names
from tfloop.weights.effective import detach, is_parametrized, owned_weights
from tfloop.weights.forward import effective_value
from tfloop.weights.parametrize import forget, incomplete_configs, parametrized

WRAPPERS = ("tfloop>Parametrized", "tfloop>SpectralNormalization")
FUNCTIONAL = {
    "module": _keras.Functional.__module__,
    "class_name": _keras.Functional.__name__,
    "registered_name": _keras.Functional.__name__,
}
FUNCTIONAL_KEYS = ("name", "trainable", "layers", "input_layers", "output_layers")


def bake(model):
    """A plain Keras model with the same outputs, and no parametrisation in it.

    Args:
        model: a functional, Sequential or subclassed Keras model, built, with parametrised weights (or without:
            then a plain copy). Its layers and parametrisations need not be registered.

    Returns a new model that is not compiled: wrappers are gone, a functional `tfloop.Model` is a
    `keras.Model`, and each parametrised weight has its effective value. Its file can be loaded where tfloop
    is not installed, if the layers of your own that it holds can.

    What a subclassed model's own constructor wraps or parametrises is plain in the result, but not in what its
    constructor makes again, as when its file is loaded: that is warned of. Save its weights, and load them into a
    class without parametrisations.

    Raises `ValueError` if the model is not built, and what Keras raises if the model cannot be made from its
    config (a subclassed model needs `get_config`).

    ```python
    model = keras.Sequential([keras.Input((3,)), tfloop.SpectralNormalization(layers.Dense(2))])
    plain = tfloop.bake(model)
    x = np.ones((4, 3), "float32")
    np.testing.assert_allclose(plain(x), model(x), rtol=1e-5)
    assert type(plain.layers[0]) is layers.Dense
    ```
    """
    if not model.built:
        raise ValueError(f"bake({model.name!r}): the model is not built. Call it on data, or build it, first.")
    with incomplete_configs(), keras.saving.custom_object_scope(own_classes(model)):
        baked = keras.saving.deserialize_keras_object(plain(keras.saving.serialize_keras_object(model)))
    copy_weights(model, baked)
    return baked


def own_classes(model):
    """`name -> class` of what the model is made of and a config alone could not find.

    Of two classes with one name neither, so that none stands in for the other.
    """
    found: dict[str, set] = {}
    for cls in {type(layer) for _, layer in names.walk(model)}:
        name = keras.saving.get_registered_name(cls)
        if cls.__module__.split(".")[0] != "keras" and keras.saving.get_registered_object(name) is None:
            found.setdefault(name, set()).add(cls)
    return {name: classes.pop() for name, classes in found.items() if len(classes) == 1}


def plain(config):
    """A serialised object without tfloop: wrappers replaced by what they wrap, models by Keras' own."""
    if isinstance(config, list | tuple):
        return [plain(item) for item in config]
    if not isinstance(config, dict):
        return config
    if config.get("registered_name") in WRAPPERS:
        return unwrapped(config)
    config = {key: plain(item) for key, item in config.items() if key != "compile_config"}
    for part in (config if "input_layers" in config else {}, config.get("build_config") or {}):
        part.pop("parametrizations", None)  # of a functional model, of one of a class of its own
    if is_ours(config):
        kept = {key: config["config"][key] for key in FUNCTIONAL_KEYS if key in config["config"]}
        return {**config, **FUNCTIONAL, "config": kept}
    return config


def unwrapped(entry):
    """What a wrapper wraps, in its place in the graph and under its name."""
    layer = plain(entry["config"]["layer"])
    place = {key: entry[key] for key in ("name", "inbound_nodes") if key in entry}
    name = entry["config"]["name"]
    return {**layer, **place, "config": {**layer["config"], **({"name": name} if "name" in layer["config"] else {})}}


def is_ours(config):
    module, inner = config.get("module") or "", config.get("config")
    return module.split(".")[0] == "tfloop" and isinstance(inner, dict) and "input_layers" in inner


def copy_weights(model, baked):
    """Gives the baked model the effective weights, and takes from it what it parametrised by itself.

    By position: what a constructor makes may have other names. Layers that only losses and metrics need are not in it.
    """
    own = parametrized(baked)
    if own:
        warnings.warn(
            f"bake({model.name!r}): constructors of its layers parametrise {names.listing(own)} anew. The baked model "
            "has the same outputs, but a file of it would be loaded with these parametrisations, and others: save its "
            "weights, for a class without them.",
            stacklevel=3,
        )
    detach(baked)
    for _, layer in names.walk(baked):
        forget(layer)
    sources = owned_weights(model, terms=False)
    targets = [variable for _, variable in owned_weights(baked, terms=False).values()]
    if len(sources) != len(targets):
        raise ValueError(f"bake({model.name!r}): it has {len(sources)} weights, a copy from its config {len(targets)}.")
    for (path, (_, source)), target in zip(sources.items(), targets, strict=True):
        if source.shape != target.shape:
            raise ValueError(f"bake: {path!r} has shape {source.shape}, in the copy {target.shape}.")
        target.assign(effective_value(source) if is_parametrized(source) else source)
