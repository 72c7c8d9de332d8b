"""A forward pass: one outermost call of a layer, and the effective weights made in it.

While a layer is called, reading a parametrised variable gives its effective weight. That weight is made
when it is first read, from the raw weight as it is then, and serves the rest of the pass: a layer called
twice, or a recurrent cell called once a time step, uses one tensor.
"""

import contextlib
import functools
import threading

import tensorflow as tf

from tfloop import _keras
from tfloop.step import ancestry, current_graph, current_step

_local = threading.local()


class ForwardPass:
    """The effective weights of one forward pass.

    They are made in the graph in which the pass began, also when they are first read inside an inner
    `tf.while_loop` or `tf.cond`: so a loop over time steps finds them made.
    """

    def __init__(self):
        self._graph = current_graph()
        self._values = {}  # keys hold the graph itself: a tensor is of use in its own graph only

    def effective(self, variable):
        training = state_moves(variable)
        if _keras.in_stateless_scope():  # the scope says what the raw weight is: nothing to keep
            return effective_value(variable, training)
        graph = self._home()
        key = (id(variable), graph, training if isinstance(training, bool) else id(training))
        if key not in self._values:
            outside = outside_branches(graph)
            if training is True and outside is not graph:
                with within(outside):  # state moves once a step, whether this branch is taken or not
                    effective_value(variable, training)
            with within(graph):
                self._values[key] = effective_value(variable, training)
        return self._values[key]

    def _home(self):
        """Where the pass began, if what is made there can be used here; else the current graph."""
        here = current_graph()
        return self._graph if self._graph is not None and self._graph in ancestry(here) else here


def effective_value(variable, training=False, parametrizations=None):
    """The variable's effective weight, made from its raw weight as it is now, by all of its parametrisations
    or by those given. Computed in float32 at least, whatever the precision policy; in the variable's dtype.
    """
    raw = tf.convert_to_tensor(_keras.stored_value(variable))
    value = tf.cast(raw, compute_dtype(raw.dtype.name))
    for parametrization in variable.parametrizations if parametrizations is None else parametrizations:
        value = parametrization(value, training=training)
    return tf.cast(value, raw.dtype)


def compute_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"


def state_moves(variable):
    """Whether `u` and the like move: in training, of a weight that is trained.

    What counts is the `training` argument of the call or of a call around it; where nobody said, the
    tfloop step decides. A bool, or the tensor that was given as `training`.
    """
    step = current_step()
    if not variable.trainable or (step is not None and step.kind != "train"):
        return False
    training = _keras.call_training() if _keras.call_context() else getattr(_local, "training", None)
    if training is None:
        return step is not None
    return training if tf.is_tensor(training) else bool(training)


def current_forward_pass():
    """The forward pass that runs in this thread, or `None` outside one."""
    begun = getattr(_local, "forward_pass", None)
    context = _keras.call_context()
    if begun is not None or context is None:
        return begun
    if not hasattr(context, "forward_pass"):
        context.forward_pass = ForwardPass()
    return context.forward_pass


@contextlib.contextmanager
def forward_pass(training=None, anew=False):
    """Makes sure that a forward pass runs: it begins here unless one has begun.

    Keras' own call context carries it. Where there is none (`layer.call(x)`, `stateless_call`, the
    backward pass of a rematerialised layer) or with `anew`, it ends with the block.
    """
    if current_forward_pass() is not None and not anew:
        yield
        return
    previous = getattr(_local, "forward_pass", None), getattr(_local, "training", None)
    _local.forward_pass, _local.training = ForwardPass(), training
    try:
        yield
    finally:
        _local.forward_pass, _local.training = previous


def enter_at(layer):
    """Lets every `call` of the layer run in a forward pass that began no later than there.

    Needed at the layers above a weight: one of them may call those below it in a loop.
    """
    if getattr(layer.call, "enters_forward_pass", False):
        return
    original = layer.call

    @functools.wraps(original)
    def call(*args, **kwargs):
        # A rematerialised call runs again in the backward pass and must make its weights itself.
        with forward_pass(kwargs.get("training"), anew=_keras.is_rematerialized(layer)):
            return original(*args, **kwargs)

    call.__dict__["enters_forward_pass"] = True
    layer.__dict__["call"] = call


def outside_branches(graph):
    """The graph around the conditionals and loops of the step that lead to this one."""
    step = current_step()
    while step is not None and graph is not step.graph and _keras.is_branch(graph):
        graph = graph.outer_graph
    return graph


def within(graph):
    return graph.as_default() if graph not in (None, current_graph()) else contextlib.nullcontext()
