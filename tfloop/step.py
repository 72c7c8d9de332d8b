"""A step: one pass over one batch, from the forward pass to the last metric.

The current step is kept per thread, as every replica of a distributed step runs in its own thread.
Whatever must happen once in a step, and is called for from several places, asks the step for it.
"""

import contextlib
import threading

import tensorflow as tf

_local = threading.local()


class Step:
    """One step being run (eagerly) or traced (in a graph).

    `kind` is `"train"`, `"test"` or `"predict"`, `graph` the graph in which it is traced. `uncompilable` collects
    the names of what XLA cannot compile; whoever runs such a thing in the step appends to it.
    """

    def __init__(self, kind="train"):
        self.kind = kind
        self.graph = current_graph()
        self.uncompilable: list[str] = []
        self._memo = {}

    @property
    def training(self):
        return self.kind == "train"

    def once(self, key, act):
        """Calls `act()`, unless it was called for that key before in this step.

        What was done in an inner graph, as of a conditional, may not happen: it counts there only, and in those inside.
        """
        done = self._memo.setdefault(key, [])
        here = current_graph()
        if not any(graph is d for graph in (*ancestry(here), None) for d in done):
            done.append(here)
            act()


def current_graph():
    """The graph being built, or `None` where operations run eagerly."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def ancestry(graph):
    """The graph and those around it, innermost first."""
    while graph is not None:
        yield graph
        graph = getattr(graph, "outer_graph", None)


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
