"""Tensors: every named tensor of one step, as an immutable mapping.

Losses and metrics see this and nothing else: the batch (`x`, `y`, `sample_weight`), the prediction
(`y_pred`), each layer's output under its path (`encoder/attention`), what `tag` named, `losses/...`,
`weights/...`, and after the backward pass `gradients/...` and `updates/...`. The names of the batch are
the batch's, whatever layers are called: the output of a layer `y` is `y:1`. Recording costs nothing in
a graph: a tensor that nobody asks for is pruned with the operations that only it needed.
"""

import collections.abc
import contextlib
import fnmatch
import functools
import threading

import keras
import tensorflow as tf

from tfloop import _keras, names

NAMESPACES = ("losses/", "weights/", "gradients/", "updates/")
BATCH = ("x", "y", "sample_weight", "y_pred")
LOOPS = "tf.while_loop, tf.cond, vectorized_map, RNN loop or inner function"


class MissingTensor(KeyError):
    """A name that is not among the tensors of the step.

    `only_training` tells names of the backward pass, which evaluation does not have.
    """

    def __init__(self, message, only_training=False):
        super().__init__(message)
        self.only_training = only_training

    def __str__(self):
        return self.args[0]  # KeyError shows its message quoted


class Tensors(collections.abc.Mapping):
    """An immutable mapping from names to the tensors of a step.

    Values are of whatever shape and dtype the step made them. A wrong name raises `KeyError` with the
    nearest names, or with the reason why the tensor cannot be had.

    ```python
    model = keras.Sequential([layers.Dense(3, name="hidden"), layers.Dense(2, name="logits")])
    with tfloop.capture(model) as tensors:
        model(np.ones((4, 5)))
    assert tensors["hidden"].shape == (4, 3)
    assert list(tensors.select("log*")) == ["logits"]
    ```
    """

    def __init__(self, values=(), reasons=None):
        self._values = dict(values)
        self._reasons = reasons if reasons is not None else {}

    def __getitem__(self, name):
        if name in self._values:
            value = self._values[name]
            return value() if isinstance(value, Lazy) else value
        raise self._missing(name)

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def __contains__(self, name):
        return name in self._values

    def __repr__(self):
        return f"Tensors({names.listing(self)})"

    def select(self, pattern):
        """The tensors whose full name matches the `fnmatch` pattern, under their full names.

        Raises `KeyError` where there are none of a kind, as of `gradients/*` in a loss or in evaluation.
        """
        space = next((s for s in NAMESPACES if pattern.startswith(s)), None)
        if space in self._reasons and not any(name.startswith(space) for name in self):
            raise self._missing(pattern)
        found = {k: v for k, v in self._values.items() if fnmatch.fnmatchcase(k, pattern)}
        return type(self)(found, self._reasons)

    def matching(self, pattern):
        """The names that a watch's pattern means, in order.

        A bare `*` means layer outputs and tags. So does any pattern that begins with a wildcard, unless
        no such name matches it: then it is looked for in the namespaces (`*/kernel`).
        """
        inner = [n for n in self if is_inner(n)]
        if pattern == "*":
            return inner
        if pattern.startswith(("*", "?", "[")):
            found = fnmatch.filter(inner, pattern)
            if found:
                return found
        return [n for n in self if fnmatch.fnmatchcase(n, pattern)]

    def below(self, path):
        """What a model at `path` sees as its own: its part of the names, without the path in front."""
        if not path:
            return self
        found = {inner: self._values[name] for inner, name in self.names_below(path).items()}
        reasons = {beside_batch(k[len(path) + 1 :]): v for k, v in self._reasons.items() if k.startswith(path + "/")}
        return type(self)(found, {**self._reasons, **reasons})

    def names_below(self, path):
        """`name -> full name` of what a model at `path` sees."""
        if not path:
            return dict(zip(self, self, strict=True))
        found = {}
        for name in self:
            space = next((s for s in NAMESPACES if name.startswith(s)), "")
            rest = name[len(space) :]
            if rest.startswith(path + "/"):
                inner = rest[len(path) + 1 :]
                found[space + inner if space else beside_batch(inner)] = name
            elif not space and rest == path:
                found["y_pred"] = name
        return found

    def _missing(self, name):
        return MissingTensor(self._explain(name), str(name).startswith(("gradients/", "updates/")))

    def _explain(self, name):
        if not isinstance(name, str):
            return f"Tensors are named by strings, got {name!r}."
        reasons = sorted(self._reasons.items(), key=lambda item: -len(item[0]))
        for known, reason in reasons:
            if name == known or (known.endswith("/") and name.startswith(known)):
                return f"There is no tensor {name!r} here: {reason}"
        return f"There is no tensor {name!r} in this step. {names.nearest(name, self)}"


class Lazy:
    """A tensor that is made when someone asks for it, and then kept."""

    def __init__(self, make):
        self._make = make
        self._value = None

    def __call__(self):
        if self._value is None:
            self._value = self._make()
        return self._value


def is_inner(name):
    """Whether a name is that of a layer's output or a tag: not the batch, not a namespace."""
    return not name.startswith(NAMESPACES) and name.split("/")[0] not in BATCH


def beside_batch(name):
    """The name of a layer's output: what would be the step's own is the next free one, `y:1` for a layer `y`."""
    first, slash, rest = name.partition("/")
    word, _, count = first.partition(":")
    taken = word in BATCH or (slash and f"{word}/" in NAMESPACES)
    return f"{word}:{int(count or 0) + 1}{slash}{rest}" if taken and (not count or count.isdigit()) else name


def flatten(name, value):
    """`(name, leaf)` for every tensor of a structure: `x`, or `x/0`, `x/image`, ..."""
    if value is None:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(f"{name}/{key}", item)
    elif isinstance(value, list | tuple):
        keys = getattr(value, "_fields", range(len(value)))
        for key, item in zip(keys, value, strict=True):
            yield from flatten(f"{name}/{key}", item)
    else:
        yield name, value


def tensors_in(name, value):
    """As `flatten`, without the leaves that are no tensors."""
    return [(n, leaf) for n, leaf in flatten(name, value) if hasattr(leaf, "dtype") and hasattr(leaf, "shape")]


def as_it_is_now(leaf):
    """The leaf; of a variable the value that it has at this point of the step, whatever is assigned later."""
    return tf.convert_to_tensor(leaf) if isinstance(leaf, keras.Variable | tf.Variable) else leaf


class Recorder:
    """Records the outputs of the layers of one model, and tags, while it is active in a thread."""

    def __init__(self, model):
        self.model = model
        self._paths = names.layer_names(model)
        self.values = {}
        self.reasons = dict.fromkeys(map(beside_batch, self._paths.values()), "this layer was not called in the step.")
        self.output = None  # of the model's last call
        self._calls = {}
        self._loops = []  # the RNNs being called whose cell runs in a loop
        self._maps = _keras.maps_entered()
        self._probed = set()  # those of them whose cell has been called once, before the loop
        self._graph = current_graph()

    def tensors(self):
        return Tensors(self.values, self.reasons)

    def enter(self, operation):
        if is_loop(operation):
            self._loops.append(operation)

    def leave(self, operation):
        if is_loop(operation):
            self._loops.pop()
            self._probed.discard(id(operation))
        elif self._loops and operation is self._loops[-1].cell:
            self._probed.add(id(self._loops[-1]))

    @property
    def probing(self):
        """Whether an RNN calls its cell to learn the shape of its output, before the loop that counts."""
        return bool(self._loops) and id(self._loops[-1]) not in self._probed

    def record(self, operation, outputs):
        if operation is self.model:
            if self._reachable(outputs):
                self.output = outputs
            return
        path = self._path(operation)
        if path is not None:
            self._add(path, outputs)

    def tag(self, tensor, name):
        if name.split("/")[0] in BATCH or name.startswith(NAMESPACES):
            raise ValueError(
                f"tag(tensor, {name!r}): this name is the step's own. The names {names.listing(BATCH)} and those "
                f"that begin with {names.listing(NAMESPACES)} are taken; choose another."
            )
        if name in self._paths.values():
            raise ValueError(f"tag(tensor, {name!r}): a layer of the model has this name. Choose another.")
        self._add(name, tensor)

    def _path(self, operation):
        if id(operation) not in self._paths and isinstance(operation, keras.layers.Layer):
            self._paths = names.layer_names(self.model)  # the layer may have been made in `build`
            self._paths.setdefault(id(operation), None)
        return self._paths.get(id(operation))

    def _add(self, path, outputs):
        leaves = tensors_in("", outputs)
        if not self._reachable(outputs):
            for suffix, _ in leaves:
                name = beside_batch(path + suffix)
                if name not in self.values:
                    self.reasons[name] = f"it was made inside a {LOOPS}, and cannot leave it."
            return
        calls = self._calls.get(path, 0)
        self._calls[path] = calls + 1
        for suffix, leaf in leaves:
            name = beside_batch((f"{path}:{calls}" if calls else path) + suffix)
            if name in self.values or (suffix and name in self._paths.values()):  # a key of an output, and a layer
                name = names.unique(name if suffix else path, {*self.values, *self._paths.values()})
            self.reasons.pop(name, None)
            self.values[name] = as_it_is_now(leaf)

    def _reachable(self, outputs):
        return not (self._loops or _keras.maps_entered() > self._maps) and all(
            getattr(t, "graph", self._graph) is self._graph for _, t in tensors_in("", outputs)
        )


def is_loop(operation):
    """An RNN that is not unrolled runs its cell in a loop: eagerly too, its cell's outputs stay inside."""
    return isinstance(operation, keras.layers.RNN) and not operation.unroll


def current_graph():
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


_local = threading.local()


def recorders():
    """The recorders active in this thread, outermost first."""
    return getattr(_local, "recorders", ())


@contextlib.contextmanager
def recording(recorder):
    """Makes the recorder hear every layer call and tag of this thread, but for those that a gradient makes again."""
    with (
        _keras.observing_calls(recorders),
        _keras.noticing_maps(),
        _keras.patched(tf.GradientTape, "gradient", unheard),
        hearing(*recorders(), recorder),
    ):
        yield recorder


@contextlib.contextmanager
def hearing(*active):
    previous, _local.recorders = recorders(), active
    try:
        yield
    finally:
        _local.recorders = previous


def unheard(gradient):
    """The function without recorders: `tf.recompute_grad` calls layers once more there, for what they gave before."""

    @functools.wraps(gradient)
    def called(*args, **kwargs):
        with hearing():
            return gradient(*args, **kwargs)

    return called


@contextlib.contextmanager
def capture(model):
    """Records the layer outputs and tags of any Keras model while the block runs.

    Args:
        model: any `keras.Model` or layer. Works eagerly, inside `tf.function` and under XLA; per thread.

    Yields the `Tensors`, which fill as the model is called; their names are paths below `model`.

    ```python
    model = keras.Sequential([layers.Dense(3, name="hidden"), layers.Dense(2)])
    with tfloop.capture(model) as t:
        model(np.ones((4, 5)))
    np.testing.assert_equal(t["hidden"].shape, (4, 3))
    ```
    """
    recorder = Recorder(model)
    view = recorder.tensors()
    view._values = recorder.values
    with recording(recorder):
        yield view


def tag(tensor, name):
    """Names a tensor that is no layer's output, and returns it as it is.

    Args:
        tensor: a tensor of any shape and dtype, or a structure of tensors; of a variable the value is kept that
            it has then. In a layer's `call` that is the weight which the layer uses.
        name: str. In one step a name that occurs again becomes `name:1`, `name:2`, ...

    Outside a tfloop step or `capture` it does nothing.

    Raises `ValueError` when the name is that of a layer or belongs to the step (`x`, `gradients/...`).
    """
    if not any(isinstance(leaf, keras.KerasTensor) for _, leaf in flatten("", tensor)):
        for recorder in recorders():
            recorder.tag(tensor, name)
    return tensor
