"""Names: the one rule by which layers, operations and weights are called below a model.

A layer is named by its path below the model: attribute names in subclassed models and layers
(`encoder/attention`, in lists and dicts `blocks/0`, `heads/image`), layer names in functional and
Sequential ones. A weight is named by its layer's path with the variable's name last
(`encoder/attention/kernel`). A layer that can be reached in several ways has the first name found.
"""

import contextlib
import difflib
import threading

import keras

from tfloop import _keras

Layers = dict[int, str]
HOLDERS = keras.Operation, dict, list, tuple  # what may be a layer, or hold some


def children(layer, terms=True):
    """The layers and operations directly below `layer`, as a list of `(name, child)` in order.

    `terms`: with those that only losses and metrics on symbolic tensors need, or as if there were none.
    """
    found: dict[int, tuple[str, keras.Operation]] = {}

    def add(name, value):
        if isinstance(value, keras.layers.InputLayer):
            return
        if isinstance(value, keras.Operation):
            found.setdefault(id(value), (name, value))
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}/{key}", item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                add(f"{name}/{index}", item)

    for child in graph_operations(layer, terms):
        add(child.name, child)
    for name, value in vars(layer).items():
        if isinstance(value, HOLDERS) and not _keras.is_bookkeeping(name):
            add(name, value)
    for child in _keras.tracked_layers(layer):  # tracked by a container that is no attribute
        if terms or child is not vars(layer).get("_with_terms"):
            add(child.name, child)
    return list(found.values())


def graph_operations(layer, terms=True):
    """The operations of a functional model or the layers of a Sequential one; else nothing."""
    if isinstance(layer, keras.Sequential):
        return list(layer.layers)
    if isinstance(layer, keras.Function):
        # A functional tfloop.Model with losses or metrics on symbolic tensors has a larger graph beside its own.
        return list((getattr(layer, "_with_terms", layer) if terms else layer).operations)
    return []


@contextlib.contextmanager
def unchanging():
    """While this is open, in this thread, nothing is added to or taken from models: each is walked over once."""
    before = _walks()
    _local.walks = {} if before is None else before
    try:
        yield
    finally:
        _local.walks = before


def _walks():
    return getattr(_local, "walks", None)


_local = threading.local()


def walk(model, terms=True):
    """Yields `(path, operation)` for the model (path `""`) and everything below, owners first. `terms` as above."""
    known = _walks()
    if known is None or not terms:
        return _walk(model, terms)
    if id(model) not in known:
        known[id(model)] = model, list(_walk(model))
    return iter(known[id(model)][1])


def _walk(model, terms=True):
    seen = {id(model)}

    def below(path, layer):
        yield path, layer
        if not isinstance(layer, keras.layers.Layer):
            return
        for name, child in children(layer, terms):
            if id(child) not in seen:
                seen.add(id(child))
                yield from below(join(path, name), child)

    yield from below("", model)


def layer_names(model) -> Layers:
    """`id(operation) -> path` for everything below the model."""
    return {id(layer): path for path, layer in walk(model) if path}


def weight_names(model):
    """`path -> keras.Variable` for every weight of the model, in the model's order of layers."""
    named: dict[str, keras.Variable] = {}
    for path, layer in walk(model):
        for variable in own_weights(layer):
            name = unique(join(path, variable.name), named)
            named[name] = variable
    return named


def own_weights(layer):
    """The weights that belong to the layer itself and not to one below it."""
    if not isinstance(layer, keras.layers.Layer):
        return []
    below = {id(v) for _, child in children(layer) for v in getattr(child, "weights", ())}
    return [v for v in layer.weights if id(v) not in below]


def join(path, name):
    return f"{path}/{name}" if path else name


def unique(name, taken):
    """`name`, or `name:1`, `name:2`, ... if it is taken."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}:{count}"
    return candidate


def nearest(name, names, count=5):
    """A sentence that names what comes nearest to `name`, for error messages."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    if close:
        return "Did you mean " + ", ".join(repr(n) for n in close) + "?"
    return "There is " + listing(names) + "."


def listing(names, limit=30):
    """The names, quoted, in a row that does not grow without bound."""
    names = [repr(n) for n in names]
    if not names:
        return "nothing"
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
