"""The state of callbacks: what a checkpoint keeps of them, so that a resumed run goes on with it.

A callback that offers `get_state()` and `set_state(state)` is asked; of Keras' own callbacks the attributes
are known, and of a subclass of one what it adds is kept as far as it can be. The state is what JSON can hold,
arrays and tensors.
"""

import dis
import functools

import keras
import numpy as np

from tfloop.runs import files

_KERAS = (
    (keras.callbacks.History, ("epoch", "history")),
    (keras.callbacks.EarlyStopping, ("wait", "stopped_epoch", "best", "best_epoch", "best_weights")),
    (keras.callbacks.ReduceLROnPlateau, ("wait", "cooldown_counter", "best")),
    (
        keras.callbacks.ModelCheckpoint,
        ("best", "epochs_since_last_save", "_current_epoch", "_batches_seen_since_last_saving", "_last_batch_seen"),
    ),
    (keras.callbacks.SwapEMAWeights, ("_ema_weights_in_model",)),
    (keras.callbacks.CSVLogger, ("keys",)),
    # Their hooks depend on the epoch alone, or what they keep is in the model's state.
    (keras.callbacks.LearningRateScheduler, ()),
    (keras.callbacks.TerminateOnNaN, ()),
    (keras.callbacks.LambdaCallback, ()),
)


def get_states(callbacks):
    """`(states, tensors)`: a list with the state of each callback, its arrays apart under their names."""
    states, tensors = [], {}
    for index, callback in enumerate(callbacks):
        state = _get(callback)
        states.append({"class": type(callback).__name__, "state": take_out(state, f"callbacks/{index}", tensors)})
    return states, tensors


def set_states(callbacks, states, tensors):
    """Sets what `get_states` returned. Returns the names of callbacks, and of attributes of theirs, that begin anew."""
    states, anew = list(states), []
    for callback in callbacks:
        name = type(callback).__name__
        place = next((i for i, saved in enumerate(states) if saved["class"] == name), None)
        saved = states.pop(place)["state"] if place is not None else None
        if saved is not None:
            _set(callback, put_back(saved, tensors))
        elif _kind(callback)[1] is None and _added(callback):
            anew.append(name)
        anew += [f"{name}.{attribute}" for attribute in _left_out(callback)]
    return anew


def _left_out(callback):
    """The names of the attributes that a subclass of one of Keras' has and that cannot be kept."""
    if hasattr(callback, "get_state") or _kind(callback)[1] is None:
        return []
    added = [(name, getattr(callback, name)) for name in _added(callback)]
    return [name for name, value in added if not callable(value) and not _can_be_kept(value)]


def _kind(callback):
    """The class of Keras' that a callback is of, and what that keeps: `None` if that is not known."""
    return next(
        ((kind, names) for kind, names in _KERAS if isinstance(callback, kind)), (keras.callbacks.Callback, None)
    )


def _added(callback):
    """The names of the attributes that a callback has beside those that its class of Keras' sets."""
    kind, _ = _kind(callback)
    keras_own = set().union(*map(_stored, kind.__mro__))
    return [name for name in vars(callback) if name not in keras_own]


@functools.cache
def _stored(kind):
    """The names of the attributes that the methods of a class set."""
    codes = [method.__code__ for method in vars(kind).values() if hasattr(method, "__code__")]
    return {i.argval for code in codes for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}


def _can_be_kept(value):
    try:
        take_out(value, "", {})
    except TypeError:
        return False
    return True


def _get(callback):
    if hasattr(callback, "get_state"):
        return callback.get_state()
    _, known = _kind(callback)
    if known is None:
        return None
    added = [name for name in _added(callback) if _can_be_kept(getattr(callback, name))]
    return {name: getattr(callback, name) for name in (*known, *added) if hasattr(callback, name)}


def _set(callback, state):
    if hasattr(callback, "set_state"):
        callback.set_state(state)
        return
    for name, value in state.items():
        setattr(callback, name, value)


def take_out(value, path, tensors):
    """A copy of `value` with `{"tensor": name}` in the place of every array, and numbers in the place of scalars.

    `TypeError` if there is anything else in it than what JSON can hold.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"The state of {path} has the key {key!r}. A checkpoint's keys are strings.")
        return {key: take_out(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if files.PLAIN.issuperset(map(type, value)):  # a history has thousands
            return list(value)
        return [take_out(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    value = files.plain(value)
    if isinstance(value, np.ndarray):
        tensors[path] = value
        return {"tensor": path}
    if not isinstance(value, tuple(files.PLAIN)):
        raise TypeError(
            f"The state of {path} holds {value!r}, a {type(value).__name__}. A checkpoint can hold numbers, strings, "
            "None, arrays, tensors, and lists and dicts of them."
        )
    return value


def put_back(value, tensors):
    """What `take_out` was given."""
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: put_back(item, tensors) for key, item in value.items()}
    return [put_back(item, tensors) for item in value] if isinstance(value, list) else value
