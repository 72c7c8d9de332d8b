"""A step: one pass over one batch, from the forward pass to the last metric.

The current step is kept per thread, as every replica of a distributed step runs in its own thread.
Whatever must happen once in a step, and is called for from several places, asks the step for it.
"""

import contextlib
import threading

_local = threading.local()


class Step:
    """One step being run (eagerly) or traced (in a graph).

    `kind` is `"train"`, `"test"` or `"predict"`. `once(key, compute)` gives the result of `compute()`,
    which is called for the first caller of that key and not again in this step. `uncompilable` collects the
    names of what XLA cannot compile; whoever runs such a thing in the step appends to it.
    """

    def __init__(self, kind="train"):
        self.kind = kind
        self.uncompilable: list[str] = []
        self._memo = {}

    @property
    def training(self):
        return self.kind == "train"

    def once(self, key, compute):
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]


def current_step():
    """The step being run or traced in this thread, or `None` outside one."""
    return getattr(_local, "step", None)


@contextlib.contextmanager
def running(step):
    """Makes `step` the current one of this thread."""
    previous = current_step()
    _local.step = step
    try:
        yield step
    finally:
        _local.step = previous
