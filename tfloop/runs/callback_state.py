"""The state of callbacks: what a checkpoint keeps of them, so that a resumed run goes on with it.

A callback that offers `get_state()` and `set_state(state)` is asked; of Keras' own callbacks the attributes
are known. The state is what JSON can hold, arrays and tensors.
"""

import keras
import numpy as np

from tfloop.runs import files

_KERAS = (
    (keras.callbacks.History, ("epoch", "history")),
    (keras.callbacks.EarlyStopping, ("wait", "stopped_epoch", "best", "best_epoch", "best_weights")),
    (keras.callbacks.ReduceLROnPlateau, ("wait", "cooldown_counter", "best")),
    (keras.callbacks.ModelCheckpoint, ("best", "epochs_since_last_save", "_current_epoch")),
)
# Nothing to keep: their hooks depend on the epoch alone, or what they keep is in the model's state.
_STATELESS = (keras.callbacks.LearningRateScheduler, keras.callbacks.TerminateOnNaN, keras.callbacks.LambdaCallback)


def get_states(callbacks):
    """`(states, tensors)`: a list with the state of each callback, its arrays apart under their names."""
    states, tensors = [], {}
    for index, callback in enumerate(callbacks):
        state = _get(callback)
        states.append({"class": type(callback).__name__, "state": take_out(state, f"callbacks/{index}", tensors)})
    return states, tensors


def set_states(callbacks, states, tensors):
    """Sets what `get_states` returned. Returns the names of callbacks that begin anew."""
    states, anew = list(states), []
    for callback in callbacks:
        name = type(callback).__name__
        place = next((i for i, saved in enumerate(states) if saved["class"] == name), None)
        saved = states.pop(place)["state"] if place is not None else None
        if saved is not None:
            _set(callback, put_back(saved, tensors))
        elif _keeps_something(callback):
            anew.append(name)
    return anew


def _attributes(callback):
    return next((names for kind, names in _KERAS if isinstance(callback, kind)), ())


def _get(callback):
    if hasattr(callback, "get_state"):
        return callback.get_state()
    names = _attributes(callback)
    return {name: getattr(callback, name) for name in names if hasattr(callback, name)} if names else None


def _set(callback, state):
    if hasattr(callback, "set_state"):
        callback.set_state(state)
        return
    for name, value in state.items():
        setattr(callback, name, value)


def _keeps_something(callback):
    inherited = vars(keras.callbacks.Callback()).keys() | {"_model", "params"}
    return not isinstance(callback, _STATELESS) and bool(vars(callback).keys() - inherited)


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
