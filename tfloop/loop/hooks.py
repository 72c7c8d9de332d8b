"""Hooks: the callbacks of a fit, and which of them must see every step."""

import keras

from tfloop.loop.observer import Observer


class Hooks:
    """The callbacks of a fit. `hooks.on_epoch_end(epoch, logs)` calls that of each, in order.

    Keras' own `CallbackList` would sort the logs by name; here they keep the order in which they are shown. A
    callback may add to the logs, as the learning rate's do: those after it, and the bar, show what it added.
    """

    def __init__(self, callbacks, model, **params):
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = keras.callbacks.CallbackList(
                callbacks, add_history=True, add_progbar=False, model=model, **params
            )
        self.callbacks = callbacks.callbacks
        self._taking_back = []

    def silence(self):
        """From now on only the history, and what accompanies the fit, are called; and what takes the best weights back
        at the end, as an epoch's end has left others."""
        self._taking_back = [c for c in self.callbacks if isinstance(c, keras.callbacks.EarlyStopping)]
        self.callbacks = [c for c in self.callbacks if isinstance(c, keras.callbacks.History | Observer)]

    def want_batches(self, kind):
        """Whether a callback does something at every batch of a `"train"`, `"test"` or `"predict"`."""
        return any(wants_batches(callback, kind) for callback in self.callbacks)

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)

        def call(*args):
            *where, logs = args if args and isinstance(args[-1], dict) else (*args, {})
            for callback in (*self._taking_back, *self.callbacks) if name == "on_train_end" else self.callbacks:
                getattr(callback, name)(*where, logs)

        return call


def wants_batches(callback, kind="train"):
    """Whether a callback overrides the hooks of single batches, so that it must see every step."""
    if getattr(callback, "save_freq", None) == "epoch" and isinstance(
        callback, keras.callbacks.ModelCheckpoint | keras.callbacks.BackupAndRestore
    ):
        return False
    base = keras.callbacks.Callback
    names = [f"on_{kind}_batch_begin", f"on_{kind}_batch_end"]
    if kind == "train":
        names += ["on_batch_begin", "on_batch_end"]
    hooks = ((getattr(callback, name, None), getattr(base, name)) for name in names)
    return any(getattr(hook, "__func__", hook) is not default for hook, default in hooks)
