"""Reproducibility: one seed for everything, and the state of a model as named variables.

The state of a model is every variable that decides how its training goes on: weights, optimizer
slots and counters, averages, power-iteration vectors, seed generators. Each has a name that does not
depend on what else was built in the process (Keras numbers unnamed objects across the whole process),
so that two processes, or two models built by the same code in one, agree on the names.
"""

import contextlib
import contextvars
import hashlib
import random
import re
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfloop import _keras, names
from tfloop.operation import Operation

_seed: int | None = None
_ordered_by: contextvars.ContextVar[int | None] = contextvars.ContextVar("ordered_by", default=None)  # see `ordering`


def set_seed(seed, deterministic=False):
    """Seeds Python, NumPy, TensorFlow and Keras, and the order of data in tfloop's loop.

    `seed`: an integer, 0 <= seed < 2**32 (NumPy's limit). `deterministic=True` also makes TensorFlow
    use deterministic operations only (slower on GPUs; an operation that has no deterministic form
    then raises), which holds for the rest of the process.

    Same seed, same bits holds for the same kind of machine, the same thread counts and the same engine: with
    `compile(jit_compile="auto")` each run measures which is the fastest, and may find another one.
    """
    global _seed
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"set_seed: seed must be an integer, got {seed!r}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"set_seed: seed must be in 0 .. 2**32 - 1, got {seed}.")
    _seed = int(seed)
    keras.utils.set_random_seed(_seed)
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def current_seed():
    """The seed in force: the last one given to `set_seed` or `keras.utils.set_random_seed`; else `None`.

    `set_seed` goes through Keras, so Keras' own record is the newer of the two.
    """
    if (seed := _ordered_by.get()) is not None:
        return seed
    seed = _keras.random_seed()
    return _seed if seed is None else seed


@contextlib.contextmanager
def ordering(seed):
    """Within this, in this thread, `seed` orders data, whatever was set since by others; `None`: what was set last."""
    before = _ordered_by.set(seed)
    try:
        yield
    finally:
        _ordered_by.reset(before)


# Which variables


def state_variables(model):
    """`name -> variable` for every state variable of a model, in a fixed order. Not metrics.

    Weights come first (`encoder/dense/kernel`), then seed generators and plain `tf.Variable`s held by
    layers (`encoder/dropout/seed_generator`), optimizers (`optimizer/iterations`,
    `optimizer/momentums/encoder/dense/kernel`), then what the model offers in a method
    `extra_state() -> {name: variable}`. What a layer holds in an object of a class of one's own, a `tf.Module`
    or a plain one, is among them by its attribute (`encoder/ema/value`).
    """
    owners = _owners(model)
    state = _weights(owners)
    weights = {id(variable): name for name, variable in state.items()}
    for path, owner in owners:
        for name, variable in _other_variables(owner):
            state.add(names.join(path, name), variable)
    for path, optimizer in _optimizers(owners):
        for slot, variable in _optimizer_variables(optimizer, weights):
            state.add(f"{path}/{slot}", variable)
    for name, variable in getattr(model, "extra_state", dict)().items():
        state.add(name, variable)
    return state.named


def optimizers(model):
    """`(path, optimizer)` of the optimizer of `compile` and all others that the model holds."""
    return _optimizers(_owners(model))


def unbuilt_optimizers(model):
    """Names of optimizers that have no slots yet: a `train_step` of one's own builds them when it first runs."""
    return [path for path, optimizer in optimizers(model) if not optimizer.built]


def unbuilt_metrics(model):
    """Names of metrics that have no variables yet and make them at their first update."""
    return [name for name, metric in _metrics(model) if not _keras.is_metric_built(metric)]


def weights(model):
    """`name -> variable` for the weights alone, named as among the `state_variables`."""
    return _weights(_layers(model)).named


def _layers(model):
    return [(path, layer) for path, layer in _walk(model) if isinstance(layer, keras.layers.Layer)]


def _owners(model):
    """`(path, owner)` of the layers, then of the objects that they hold, and of what those hold, layers too."""
    owners = _layers(model)
    seen = {id(owner) for _, owner in owners}
    for path, owner in owners:  # it grows
        found = []
        for name, value in _values(owner):
            if _is_holder(value):
                found.append((names.join(path, name), value))
            elif isinstance(value, keras.layers.Layer) and _is_holder(owner):
                found += [(names.join(path, names.join(name, below)), layer) for below, layer in _layers(value)]
        for place, value in found:
            if id(value) not in seen:
                seen.add(id(value))
                owners.append((place, value))
    return owners


_STATE = (keras.random.SeedGenerator, tf.random.Generator, tf.Variable, keras.Variable)
# Not searched: what is no object of the user's own, and what is looked after elsewhere.
_LIBRARIES = frozenset({"keras", "tensorflow", "tfloop", "numpy", "scipy", "pandas"}) | sys.stdlib_module_names
_LOOKED_AFTER = (
    *(keras.Operation, keras.Metric, keras.optimizers.Optimizer, keras.callbacks.Callback, keras.utils.PyDataset),
    *_STATE,
)


def _is_holder(value):
    """Whether an object is of a class of the user's own, or a `tf.Module`, and may hold variables as attributes."""
    if isinstance(value, _LOOKED_AFTER) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, tf.Module) or type(value).__module__.partition(".")[0] not in _LIBRARIES


def _optimizers(owners):
    """`(path, optimizer)`, each once."""
    found = {}
    for path, owner in owners:
        for name, value in _values(owner):
            if isinstance(value, keras.optimizers.Optimizer):
                found.setdefault(id(value), (names.join(path, name), value))
    return list(found.values())


def _weights(layers):
    state = _Names()
    for path, layer in layers:
        for name, variable in _numbered(names.own_weights(layer)):
            state.add(names.join(path, name), variable)
    return state


def metric_variables(model):
    """`name -> variable` for every variable of the model's metrics: `metrics/accuracy/total`.

    Of a `tfloop.Model` those too that its own `metrics` leaves out. A metric may make its variables at its first
    update.
    """
    state = _Names()
    for name, metric in _metrics(model):
        for variable_name, variable in _numbered(metric.variables):
            state.add(f"metrics/{name}/{variable_name}", variable)
    return state.named


def _metrics(model):
    return list(_numbered(getattr(model, "_tfloop_every_metric", lambda: model.metrics)()))


def process_variables(create=False):
    """`name -> variable` for the state that belongs to the process: Keras' global seed generator.

    `keras.random.*` without a seed draws from it. It exists from the first draw on; `create=True`
    makes it, to restore it. A model's fingerprint leaves it out.
    """
    generator = _keras.global_seed_generator(create)
    return {} if generator is None else {"process/seed_generator": generator.state}


def random_state():
    """The states of Python's and NumPy's global random numbers: plain values and arrays of uint32."""
    version, numbers, gauss = random.getstate()
    generator: Any = np.random.get_state(legacy=False)
    return {"python": {"version": version, "numbers": np.array(numbers, np.uint32), "gauss": gauss}, "numpy": generator}


def set_random_state(state):
    """Sets what `random_state` returned."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    np.random.set_state(state["numpy"])


def is_random_state(state):
    """Whether nobody drew from them since `random_state` returned this."""
    return all(map(np.array_equal, keras.tree.flatten(state), keras.tree.flatten(random_state())))


# What they hold


class Reader:
    """Reads named variables again and again, all in one call: one by one each costs some 40 us.

    `Reader(variables)()` is `snapshot(variables)`. Variables made later are not among them.
    """

    def __init__(self, variables):
        self._names = list(variables)
        values = [v.value if isinstance(v, keras.Variable) else v for v in variables.values()]
        read = tf.function(lambda: [tf.identity(value) for value in values], autograph=False)
        self._read = Operation(read.get_concrete_function())

    def __call__(self):
        """`name -> array`, copied out."""
        values = self._read()
        return {n: np.asarray(value.numpy()) for n, value in zip(self._names, values, strict=True)}


def snapshot(variables):
    """`name -> array`: the values of named variables, copied out."""
    return {name: _value(variable) for name, variable in variables.items()}


def assign(variables, arrays):
    """Sets each named variable for which there is an array of its name."""
    for name, variable in variables.items():
        if name in arrays:
            variable.assign(arrays[name])


def fingerprint(model):
    """SHA-256, in hexadecimal, over name, dtype, shape and bytes of every state variable of a model.

    Equal fingerprints: bit for bit the same weights, optimizer, averages, `u` and seed generators.
    Metrics are left out. Raises `TypeError` for what is neither a model nor a layer.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"fingerprint({model!r}): expected a model or a layer.")
    return fingerprint_of(snapshot(state_variables(model)))


def fingerprint_of(arrays):
    """The fingerprint of named arrays, as `snapshot` returns them."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        head = f"{len(name)}:{name} {array.dtype} {list(array.shape)}\n"
        digest.update(head.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def first_difference(first, second):
    """A sentence that names the first variable in which two snapshots differ; `None` if none does.

    The comparison is of bits: a NaN equals itself, 0.0 and -0.0 differ.
    """
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in second:
            return f"{name!r} is only in the first."
        if name not in first:
            return f"{name!r} is only in the second."
        a, b = np.asarray(first[name]), np.asarray(second[name])
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name!r} is {_kind(a)} in the first and {_kind(b)} in the second."
        if a.tobytes() != b.tobytes():
            return f"{name!r} {_kind(a)} differs in {_how_much(a, b)}."
    return None


def _how_much(a, b):
    size = a.dtype.itemsize
    bits = [np.frombuffer(x.tobytes(), np.uint8).reshape(-1, size) for x in (a, b)]
    count = int(np.any(bits[0] != bits[1], axis=1).sum())
    with np.errstate(all="ignore"):
        largest = np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)))
    return f"{count} of {a.size} elements, by {largest:.3g} at most"


def _kind(array):
    return f"{array.dtype}{list(array.shape)}"


def _value(variable):
    if isinstance(variable, keras.Variable):
        return np.array(keras.ops.convert_to_numpy(variable))
    return np.array(variable.numpy())


# Names that do not depend on the process


class _Names:
    """Variables by name: each variable once, each name once."""

    def __init__(self):
        self.named = {}
        self._known = set()

    def add(self, name, variable):
        if id(variable) not in self._known:
            self._known.add(id(variable))
            self.named[names.unique(name, self.named)] = variable

    def items(self):
        return self.named.items()


def _walk(model):
    """As `names.walk`, with layers of automatic names numbered within their owner."""
    seen = {id(model)}

    def below(path, layer):
        yield path, layer
        if not isinstance(layer, keras.layers.Layer):
            return
        graph = {id(child) for child in names.graph_operations(layer)}
        children = names.children(layer)
        numbered = _numbered(child for _, child in children if id(child) in graph)
        by_graph = {id(child): name for name, child in numbered}
        for name, child in children:
            if id(child) not in seen:
                seen.add(id(child))
                yield from below(names.join(path, by_graph.get(id(child), name)), child)

    yield from below("", model)


def _numbered(objects):
    """`(name, object)` pairs: Keras' automatic names numbered anew, from the first of each kind on.

    In a process that builds nothing else these are mostly the names Keras gives.
    """
    objects = list(objects)
    taken = {o.name for o in objects if not _is_automatic(o)}
    counts: dict[str, int] = {}
    for o in objects:
        if not _is_automatic(o):
            yield o.name, o
            continue
        base = _snake_case(type(o).__name__)
        while True:
            number = counts.get(base, 0)
            counts[base] = number + 1
            name = f"{base}_{number}" if number else base
            if name not in taken:
                break
        yield name, o


def _is_automatic(o):
    return re.fullmatch(re.escape(_snake_case(type(o).__name__)) + r"(_\d+)?", o.name) is not None


def _snake_case(name):
    """How Keras makes an automatic name of a class's name."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


_PLAIN = frozenset({type(None), bool, int, float, str})


def _values(owner):
    """`(name, value)` for an object's attributes, and for what lies in its lists and dicts."""

    def within(name, value):
        if isinstance(value, dict):
            for key, item in list(value.items()):
                yield from within(f"{name}/{key}", item)
        elif isinstance(value, list | tuple):
            if not _PLAIN.issuperset(map(type, value)):  # there may be very many
                for index, item in enumerate(value):
                    yield from within(f"{name}/{index}", item)
        else:
            yield name, value

    for name, value in list(vars(owner).items()):  # at once: another thread may add to it
        if not _keras.is_bookkeeping(name):
            yield from within(name, value)


def _other_variables(owner):
    """The state of a layer, or of another object, that Keras does not count among its weights."""
    for name, value in _values(owner):
        if isinstance(value, _STATE):
            yield name, value if isinstance(value, tf.Variable | keras.Variable) else value.state
    for index, generator in enumerate(_keras.seed_generators(owner)):
        yield f"seed_generators/{index}", generator.state


def _optimizer_variables(optimizer, weights):
    """`(name, variable)` for an optimizer's variables: by attribute, slots by the weight they belong to.

    Keras' own names for slots hold automatic layer names. `weights` is `id(variable) -> name`.
    """
    targets = _keras.optimizer_targets(optimizer)
    for attribute, value in vars(optimizer).items():
        name = attribute.lstrip("_")
        if attribute in ("_variables", "_trainable_variables"):
            continue
        if isinstance(value, keras.Variable):
            yield name, value
        elif isinstance(value, keras.optimizers.Optimizer):
            for inner, variable in _optimizer_variables(value, weights):
                yield f"{name}/{inner}", variable
        elif isinstance(value, list):
            slots = len(value) == len(targets)
            for index, item in enumerate(value):
                if isinstance(item, keras.optimizers.Optimizer):
                    for inner, slot in _optimizer_variables(item, weights):
                        yield f"{name}/{index}/{inner}", slot
                elif isinstance(item, keras.Variable):
                    of = weights.get(id(targets[index]), str(index)) if slots else str(index)
                    yield f"{name}/{of}", item
    for index, variable in enumerate(optimizer.variables):  # what no attribute holds
        yield f"variables/{index}", variable
