"""The private names of Keras and TensorFlow that cannot be avoided, each with its reason.

Read in keras 3.15.1 and TensorFlow 2.21. `tests/test_keras_internals.py` notices when one of them changes.
"""

import contextlib
import functools
import threading

import keras
from keras.src.backend.common import global_state
from keras.src.models.functional import Functional  # noqa: F401  the class behind keras.Model(inputs, outputs)
from keras.src.random import seed_generator
from keras.src.utils.rng_utils import get_random_seed

# Attributes in which Keras keeps its own books: they hold layers, but name none of them.
BOOKKEEPING_ATTRIBUTES = frozenset(
    {
        "_layers",
        "_metrics",
        "_tracker",
        "_functional",
        "_operations",
        "_operations_by_depth",
        "_nodes",
        "_nodes_by_depth",
        "_inbound_nodes",
        "_outbound_nodes",
        "_inputs",
        "_outputs",
        "_inputs_struct",
        "_outputs_struct",
        "_compiled_trainable_state",
        "_seed_generators",
        "_compile_config",
    }
)


def is_bookkeeping(attribute):
    """Whether an attribute of a layer is Keras' or (`_self_...`) TensorFlow's own record of children."""
    return attribute in BOOKKEEPING_ATTRIBUTES or attribute.startswith("_self_")


def tracked_layers(layer):
    """The sublayers that Keras tracks for a layer. `Model.layers` is public, `Layer`'s list is not."""
    return list(getattr(layer, "_layers", ()))


_lock = threading.RLock()
_patches = {}


@contextlib.contextmanager
def patched(owner, name, wrap):
    """Replaces `owner.name` by `wrap(original)` for as long as anyone, in any thread, is in the block."""
    key = (owner, name)
    with _lock:
        count, original = _patches.get(key, (0, None))
        if count == 0:
            original = vars(owner).get(name, _INHERITED)
            setattr(owner, name, wrap(getattr(owner, name)))
        _patches[key] = (count + 1, original)
    try:
        yield
    finally:
        with _lock:
            count, original = _patches[key]
            if count > 1:
                _patches[key] = (count - 1, original)
            else:
                del _patches[key]
                if original is _INHERITED:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)


_INHERITED = object()


@contextlib.contextmanager
def observing_calls(observers):
    """Lets `observers()` (those of the calling thread) see each layer and operation that is called.

    `keras.Operation.__call__` is where every call of a layer, a model or an operation of a functional graph
    ends up with its converted arguments. There is no public hook; it is wrapped only while someone looks.
    """

    def wrap(original):
        @functools.wraps(original)
        def call(operation, *args, **kwargs):
            seeing = observers()
            for observer in seeing:
                observer.enter(operation)
            try:
                outputs = original(operation, *args, **kwargs)
            finally:
                for observer in seeing:
                    observer.leave(operation)
            if seeing and not any(
                isinstance(t, keras.KerasTensor) for t in keras.tree.flatten(outputs)
            ):
                for observer in seeing:
                    observer.record(operation, outputs)
            return outputs

        return call

    with patched(keras.Operation, "__call__", wrap):
        yield


def seed_generators(layer):
    """The seed generators that Keras tracks for a layer itself. Only their states are public, mixed
    with the weights in `Layer.variables`."""
    return list(getattr(layer, "_seed_generators", ()))


def optimizer_targets(optimizer):
    """The variables an optimizer was built for, in its order. `Optimizer.variables` are its own ones."""
    return list(optimizer._trainable_variables)


def random_seed():
    """The seed given to `keras.utils.set_random_seed`, or `None`. The getter is not exported."""
    return get_random_seed()


def global_seed_generator(create=False):
    """The generator behind `keras.random.*` without a seed, or `None` if none was drawn from yet.

    It belongs to no model and no public name reaches it, so that no other checkpoint holds it.
    """
    if create:
        return seed_generator.global_seed_generator()
    return global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)
