"""The private names of Keras and TensorFlow that cannot be avoided, each with its reason.

Read in keras 3.15.1 and TensorFlow 2.21. `tests/test_keras_private.py` notices when one of them changes.
"""

import contextlib
import functools
import threading
import types
import warnings
import weakref
from typing import NamedTuple

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.common.symbolic_scope import get_symbolic_scope
from keras.src.backend.common.variables import register_uninitialized_variable
from keras.src.losses import loss as loss_module
from keras.src.models import cloning
from keras.src.models.functional import Functional, functional_like_constructor  # noqa: F401  behind keras.Model(x, y)
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.random import seed_generator
from keras.src.utils.rng_utils import get_random_seed
from tensorflow.python.framework.auto_control_deps_utils import get_read_only_resource_input_indices_graph
from tensorflow.python.framework.config import is_op_determinism_enabled
from tensorflow.python.ops import control_flow_v2_func_graphs as branches
from tensorflow.python.ops.control_flow_ops import XLAControlFlowContext

# Attributes in which Keras keeps its own books: those that hold layers name none of them, the others hold none.
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
        "_with_terms",
        "_tracked",
        "_trainable_variables",
        "_non_trainable_variables",
        "_losses",
        "_losses_override",
        "_build_shapes_dict",
        "_call_has_context_arg",
        "call_signature_parameters",
    }
)


def is_bookkeeping(attribute):
    """Whether an attribute of a layer is Keras', TensorFlow's (`_self_...`) or tfloop's own record of children."""
    return attribute in BOOKKEEPING_ATTRIBUTES or attribute.startswith(("_self_", "_tfloop_"))


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
            if seeing and not any(isinstance(t, keras.KerasTensor) for t in keras.tree.flatten(outputs)):
                for observer in seeing:
                    observer.record(operation, outputs)
            return outputs

        return call

    with patched(keras.Operation, "__call__", wrap):
        yield


@contextlib.contextmanager
def noticing_maps():
    """Lets `maps_entered` count the `vectorized_map`s whose function is traced.

    TensorFlow does that in the graph around it, on one example, and makes operations on all examples of what it
    finds: what somebody keeps there of a tensor is the one example's. `keras.ops.vectorized_map` looks TensorFlow's
    up when it is called.
    """

    def wrap(original):
        @functools.wraps(original)
        def vectorized_map(fn, *args, **kwargs):
            @functools.wraps(fn)
            def of_one_example(*elements):
                with _in_map():
                    return fn(*elements)

            return original(of_one_example, *args, **kwargs)

        return vectorized_map

    with patched(tf, "vectorized_map", wrap):
        yield


@contextlib.contextmanager
def _in_map():
    _thread.maps = maps_entered() + 1
    try:
        yield
    finally:
        _thread.maps -= 1


def maps_entered():
    """How many `vectorized_map`s trace their function in this thread now, each within the one before."""
    return getattr(_thread, "maps", 0)


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


def in_call():
    """Whether a layer is being called in this thread (`add_loss` and `add_metric` want to know).

    Keras keeps the context of the running `Layer.__call__` in its global state and shows it nowhere.
    """
    return global_state.get_global_attribute("current_call_ctx") is not None or in_symbolic_scope()


def own_metrics(layer):
    """The metric objects that are attributes of a layer or lie in its lists and dicts, in order of assignment."""
    return list(getattr(layer, "_metrics", ()))


def compiled_metrics(model):
    """The metric objects that `compile` made: the loss tracker, the compiled metrics, a tracker per output."""
    if not getattr(model, "compiled", False):
        return []
    found = [model._loss_tracker, model._compile_metrics, *compiled_output_losses(model)]
    return [m for m in found if m is not None]


def compiled_metric_names(model):
    """The names of what `compile(metrics=...)` shows; before Keras has made the metrics, as they were given."""
    metric = getattr(model, "_compile_metrics", None)
    if metric is None:
        return ()
    if not metric.built:
        return tuple(dict.fromkeys(_names_as_given(metric)))
    if "_names_by_tfloop" not in vars(metric):  # asked of the result once: some of them are made by counting
        vars(metric)["_names_by_tfloop"] = tuple(path[-1] for path, _ in leaves(metric.result()))
    return vars(metric)["_names_by_tfloop"]


def _names_as_given(metric):
    seen = set()
    for given in (metric._user_metrics, metric._user_weighted_metrics):
        found = []
        for output, part in _by_output(given, metric.output_names):
            in_front = f"{output}_" if output else ""
            for name in filter(None, map(_name_of, keras.tree.flatten(part))):
                found.append(f"{in_front}{name}" if f"{in_front}{name}" not in seen else f"{in_front}weighted_{name}")
        yield from found
        seen.update(found)


def _by_output(given, outputs):
    """`(output, what was given for it)`, without the output where there is one alone."""
    outputs = outputs or ()
    if isinstance(given, dict):
        order = [output for output in outputs if output in given] or given
        return [(output if len(outputs) != 1 else "", given[output]) for output in order]
    if isinstance(given, list | tuple) and len(outputs) == len(given) > 1:
        return list(zip(outputs, given, strict=True))
    return [("", given)]


def _name_of(metric):
    return metric if isinstance(metric, str | None) else getattr(metric, "name", getattr(metric, "__name__", None))


def compiled_output_losses(model):
    """The metric objects in which Keras keeps the loss of each of several outputs."""
    compile_loss = getattr(model, "_compile_loss", None)
    return compile_loss.metrics if compile_loss is not None else []


def compiled_loss_names(model):
    """The names of the losses of several outputs, also before Keras has made them; of one output none."""
    if made := compiled_output_losses(model):
        return [metric.name for metric in made]
    outputs = getattr(model, "output_names", None) or ()
    given = {output: loss for output, loss in _by_output(model.loss, outputs) if output}
    if not given and len(outputs) > 1:  # one for all of them
        given = dict.fromkeys(outputs, model.loss)
    return [f"{output}_loss" for output, loss in given.items() if loss is not None]


def has_regularizer(model):
    """Whether there are losses of weights or activities, which Keras adds itself."""
    of_activities = (getattr(layer, "activity_regularizer", None) for layer in model._flatten_layers())
    of_weights = (getattr(variable, "regularizer", None) for variable in model.trainable_variables)
    return any(found is not None for found in (*of_activities, *of_weights))


def compile_arguments(model):
    """What `compile` was given, as it was given; the public `get_compile_config` serializes it, code too."""
    return model._compile_config.config


def inner_metrics(metric):
    """The metric objects inside one that `compile(metrics=...)` made."""
    return list(getattr(metric, "metrics", ())) if getattr(metric, "built", True) else []


def is_metric_built(metric):
    """Whether a metric object has its variables. Some make them at the first update, and only they know."""
    return getattr(metric, "built", True) and getattr(metric, "_built", True)


def loss_tracker(model):
    return getattr(model, "_loss_tracker", None)


@contextlib.contextmanager
def separate_output_losses(model):
    """Yields a list that receives `(output name, weighted loss)` for every part of the compiled loss.

    `CompileLoss` adds them up and keeps only unweighted running means.
    """
    compile_loss, parts = model._compile_loss, []
    if compile_loss is None or not compile_loss.built:
        yield parts
        return
    flat = compile_loss._flat_losses

    def heard(entry):
        def loss(*args, **kwargs):
            value = entry.loss(*args, **kwargs)
            weighted = value if entry.loss_weights is None else value * entry.loss_weights
            parts.append((entry.name, weighted))
            return value

        return entry._replace(loss=loss)

    compile_loss._flat_losses = [heard(entry) for entry in flat]
    try:
        yield parts
    finally:
        compile_loss._flat_losses = flat


def makes_its_own_graph(model):
    """Whether a functional model's constructor takes no inputs and outputs, but makes them itself."""
    return not functional_like_constructor(type(model))


def forget_compilation(model):
    """Lets the next `compile` begin anew: Keras keeps an earlier loss or metrics where it is given none."""
    model.loss = model._compile_loss = model._compile_metrics = None


def build(model, batch):
    """Builds the model's layers, compiled metrics and optimizer for a batch, or for one of which there are only specs.

    With specs as Keras' own `fit` does under a strategy. Keras has no symbolic tensors for ragged and sparse ones: for
    these a trace that is never run, as for layers that cannot be built so: a stateful RNN makes variables then. A batch
    itself is given to the model, as what runs eagerly need not be traceable. What the user's code raises comes out as
    it is; Keras would make a `RuntimeError` of most of it.
    """
    specs = [isinstance(leaf, tf.TypeSpec) for leaf in tf.nest.flatten(batch) if leaf is not None]
    dense = [isinstance(leaf, tf.TensorSpec) for leaf in tf.nest.flatten(batch) if leaf is not None]
    if all(dense):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Keras' one, that it cannot
                model._symbolic_build(data_batch=batch)
            return
        except Exception as error:
            if are_layers_built(model):  # a trace would not come further, and Keras adds to what it raises
                wrapped = str(error).startswith("Unable to automatically build the model")
                raise (error.__context__ if wrapped and error.__context__ else error) from None
    _build_by_calling(model, batch, traced=all(specs))


def is_built(model):
    """Whether all layers are built, and what `compile` was given."""
    parts = [model._compile_metrics, model._compile_loss]
    return are_layers_built(model) and all(part is None or part.built for part in parts)


def are_layers_built(model):
    """Whether all layers are built: Keras calls a model built, too, whose layers it could not build."""
    return all(layer.built for layer in model._flatten_layers())


def _build_by_calling(model, batch, traced):
    def call(x, y, sample_weight):
        y_pred = model(x, training=False)
        if model._compile_metrics is not None:
            model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        if model._compile_loss is not None:
            model._compute_loss(x, y, y_pred, sample_weight, training=False)

    if not is_built(model):
        if traced:
            call = tf.function(call, autograph=False).get_concrete_function
        call(*keras.utils.unpack_x_y_sample_weight(batch))
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    model._post_build()


class DatasetStage(NamedTuple):
    """One stage of a `tf.data` pipeline."""

    name: str  # "Shuffle", "Map", ...
    inputs: list  # of datasets
    stateful: set  # types of stateful operations in its functions
    reshuffles: bool


def dataset_stage(dataset):
    """The last stage of a pipeline. TensorFlow has no public way to look at one."""
    name = type(dataset).__name__.removeprefix("_").removesuffix("V2").removesuffix("Dataset")
    graphs = [f.function.graph for f in dataset._functions()]
    stateful = {op.type for graph in graphs for op in graph.get_operations() if op.op_def.is_stateful}
    return DatasetStage(name, dataset._inputs(), stateful, getattr(dataset, "_reshuffle_each_iteration", True))


def own_trainable_variables(layer):
    """The variables that a layer itself made as trainable; the public lists include those of sublayers."""
    return list(getattr(layer, "_trainable_variables", ()))


def set_trainable_flag(layer, flag, variables):
    """Sets one layer's `trainable` and its variables', and nothing else, as the public setters would."""
    layer._trainable = flag
    for variable, trainable in variables:
        variable._trainable = trainable


def tensor_of(variable):
    """What a tape watches of a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def mark_results(metric):
    """From now on the tensors that `metric.result()` returns can be told by `metric_of`.

    In Keras 2 a metric's result carried its metric; in Keras 3 it is a bare tensor. The method is replaced on
    the instance, as a bound method, so that a copy of the metric marks results as its own.
    """
    if "result" not in vars(metric):
        vars(metric)["result"] = types.MethodType(_marked_result, metric)
        vars(metric)["update_state"] = types.MethodType(_noted_update, metric)


def _marked_result(metric):
    value = type(metric).result(metric)
    for path, leaf in leaves(value):
        if not hasattr(leaf, "_tfloop_metric"):  # what compiled metrics return are results of theirs already
            with contextlib.suppress(AttributeError):  # a Python number
                leaf._tfloop_metric = (weakref.ref(metric), path)
    return value


def leaves(result, path=()):
    """`(keys, leaf)` of a metric's result, which may be a dict (and in `compile(metrics=...)` a dict of dicts)."""
    if not isinstance(result, dict):
        yield path, result
        return
    for key, value in result.items():
        yield from leaves(value, (*path, key))


def _noted_update(metric, *args, **kwargs):
    with contextlib.ExitStack() as stack:
        for observer in _update_observers():
            stack.enter_context(observer(metric))
        return type(metric).update_state(metric, *args, **kwargs)


def metric_of(value):
    """`(metric, path)` of a tensor that is the result of a marked metric object, or lies in it; else `None`."""
    metric, path = getattr(value, "_tfloop_metric", (None, ()))
    return (metric(), path) if metric is not None and metric() is not None else None


def _update_observers():
    return getattr(_thread, "update_observers", ())


@contextlib.contextmanager
def observing_updates(observer):
    """Enters the context `observer(metric)` around every update of a marked metric in this thread."""
    previous = _update_observers()
    _thread.update_observers = (*previous, observer)
    try:
        yield
    finally:
        _thread.update_observers = previous


@contextlib.contextmanager
def observing_applies(observer, gate=None):
    """Tells `observer(optimizer, gradients, variables)` before every update of an optimizer in this thread.

    `gate`, called the same way and before, gives the gradients to use in place of those, or `None`: then there is
    no update. `apply` is public; there is no hook before it. An optimizer inside another is not told of.
    """
    previous = getattr(_thread, "apply_observers", ())
    _thread.apply_observers = (*previous, (observer, gate))

    def wrap(original):
        @functools.wraps(original)
        def apply(optimizer, grads, trainable_variables=None):
            observers, _thread.apply_observers = getattr(_thread, "apply_observers", ()), ()
            try:
                for told, opened in observers:
                    grads = grads if opened is None else opened(optimizer, grads, trainable_variables)
                    if grads is None:
                        return None
                    told(optimizer, grads, trainable_variables)
                return original(optimizer, grads, trainable_variables)
            finally:
                _thread.apply_observers = observers

        return apply

    try:
        with contextlib.ExitStack() as stack:
            for kind in (keras.optimizers.Optimizer, *AROUND_OTHERS):
                stack.enter_context(patched(kind, "apply", wrap))
            yield
    finally:
        _thread.apply_observers = previous


# The optimizers that hold others and hand the update on to them: their `apply` is not that of `Optimizer`.
AROUND_OTHERS = keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer


def optimizer_strategy(optimizer):
    """The strategy in whose scope an optimizer was made, or the default one; there its variables are."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(inner, "_distribution_strategy", None)


@contextlib.contextmanager
def updates_of_replicas():
    """While this is open, an optimizer makes its update on each replica for itself, with the gradients it is given.

    These have been summed over the replicas, so that all make the same update. Keras clips them first, each replica
    its own, and sums then; and it leaves the replica for the update, which no conditional may do (those of `use_ema`
    and `gradient_accumulation_steps`). What it does on other backends is what is needed here.
    """
    replacements = {
        "_apply_weight_decay": BaseOptimizer._apply_weight_decay,
        "_overwrite_model_variables_with_average_value": BaseOptimizer._overwrite_model_variables_with_average_value,
        "_backend_increment_gradient_accumulators": BaseOptimizer._backend_increment_gradient_accumulators,
        "_backend_update_step": _update_step,
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(patched(keras.optimizers.Optimizer, name, lambda _, made=replacement: made))
        yield


def _update_step(optimizer, gradients, variables, learning_rate):
    for gradient, variable in zip(gradients, variables, strict=True):
        optimizer.update_step(gradient, tensor_of(variable), learning_rate)


@contextlib.contextmanager
def losses_unscaled():
    """While this is open, Keras' losses are the mean over a replica's examples, not divided by the number of replicas.

    Keras asks two functions of one module, which are not exported.
    """
    with contextlib.ExitStack() as stack:
        for name in ("scale_loss_for_distribution", "unscale_loss_for_distribution"):
            stack.enter_context(patched(loss_module, name, lambda _: lambda value: value))
        yield


def reducing_losses(wrap):
    """Within this, how `keras.losses.Loss` reduces the losses of a batch is `wrap(original)`."""
    return patched(loss_module, "reduce_weighted_values", wrap)


@contextlib.contextmanager
def losses_by_thread(losses):
    """While this is open, the losses that layers add are in the dict that `losses()` gives for the calling thread.

    Keras has them in one list for each layer. Replicas run in threads, and change places wherever they wait for each
    other: one would clear, or count, what another has added. `losses()` is `None` in threads that are no replica.
    """

    def add_loss(original):
        @functools.wraps(original)
        def add(layer, loss):
            mine = losses()
            if mine is None or in_stateless_scope():
                return original(layer, loss)
            added = keras.tree.flatten(loss)
            for value in added:
                if not tf.is_tensor(value):
                    raise ValueError(f"add_loss: expected a tensor, made in `call`, got {value!r}.")
            mine.setdefault(id(layer), []).extend(added)

        return add

    def own_losses(original):
        @functools.wraps(original)
        def own(layer):
            mine = losses()
            return original(layer) if mine is None or in_stateless_scope() else list(mine.get(id(layer), ()))

        return own

    def clear_losses(original):
        @functools.wraps(original)
        def clear(layer):
            mine = losses()
            if mine is None or in_stateless_scope():
                return original(layer)
            mine.pop(id(layer), None)
            for sublayer in tracked_layers(layer):
                sublayer._clear_losses()

        return clear

    with (
        patched(keras.Layer, "add_loss", add_loss),
        patched(keras.Layer, "_get_own_losses", own_losses),
        patched(keras.Layer, "_clear_losses", clear_losses),
    ):
        yield


def loss_denominator(sample_weight, mask, reduction, dtype):
    """What a replica's weighted losses are divided by, if it is not the number of values; else `None`."""
    if reduction == "mean_with_sample_weight":
        weight = loss_module.apply_mask(sample_weight, mask, dtype, reduction)
        return None if weight is None else tf.reduce_sum(tf.cast(weight, dtype))
    return None if mask is None else tf.reduce_sum(tf.cast(mask, dtype))


# What Keras keeps for each thread and a step needs: each replica has a thread of its own.
_OF_THE_PROCESS = (seed_generator.GLOBAL_SEED_GENERATOR, "dtype_policy")


def process_state():
    """What Keras keeps in this thread, and means for the process, for `take_process_state` in another.

    The seed generator is made if it is not there: no replica can make one for all.
    """
    with tf.init_scope():
        global_seed_generator(create=True)
    return {name: global_state.get_global_attribute(name) for name in _OF_THE_PROCESS}


def take_process_state(state):
    """Gives Keras in this thread, a replica's that ends with its step, what `process_state` returned in another."""
    for name, value in state.items():
        global_state.set_global_attribute(name, value)


@contextlib.contextmanager
def observing_assigns(observer):
    """Tells `observer(variable)` of every Keras variable that is assigned a value in this thread."""
    previous = getattr(_thread, "assign_observers", ())
    _thread.assign_observers = (*previous, observer)

    def wrap(original):
        @functools.wraps(original)
        def assign(variable, value):
            for told in getattr(_thread, "assign_observers", ()):
                told(variable)
            return original(variable, value)

        return assign

    try:
        with patched(keras.Variable, "assign", wrap):
            yield
    finally:
        _thread.assign_observers = previous


def scales_loss(optimizer):
    """Whether an optimizer wants the loss multiplied by a factor."""
    overridden = type(optimizer).scale_loss is not keras.optimizers.Optimizer.scale_loss
    return overridden or optimizer.loss_scale_factor is not None


def loss_scale(optimizer):
    """The factor by which an optimizer wants the loss multiplied, or `None`."""
    return optimizer.scale_loss(tf.constant(1.0)) if scales_loss(optimizer) else None


def gradient_scale(optimizer):
    """The factor by which an optimizer's `apply` divides the gradients, or `None`.

    Not always that of the loss: who overrides `scale_loss` may divide before `apply`, in `apply_gradients`.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return keras.optimizers.LossScaleOptimizer.scale_loss(optimizer, 1.0)
    return optimizer.loss_scale_factor


_thread = threading.local()


def call_context():
    """The context of the outermost `Layer.__call__` running in this thread, or `None` outside one.

    It lives as long as that call, so that what must be made once a forward pass can hang on it.
    """
    return global_state.get_global_attribute("current_call_ctx")


def called_layer():
    """The layer or model whose call is the outermost one in this thread, or `None` outside one."""
    context = call_context()
    return None if context is None else context.entry_layer


def call_training():
    """The value of `training` that Keras would hand to a layer called now; `None` if nobody said."""
    context = call_context()
    return None if context is None else context.get_value("training")


def in_symbolic_scope():
    """Whether Keras runs a layer only to learn shapes. `keras.SymbolicScope` is public, asking is not."""
    return get_symbolic_scope() is not None


def in_stateless_scope():
    """Whether a `keras.StatelessScope` holds the values of variables. The class is public, asking is not."""
    return get_stateless_scope() is not None


def stored_value(variable):
    """A variable's value in its own dtype: `Variable.value` would cast it inside an autocast scope."""
    scope = get_stateless_scope()
    value = scope.get_current_value(variable) if scope is not None else None
    return variable._value if value is None else value


def autocast(variable, value):
    """Casts what stands for a variable's value as Keras casts the value itself (mixed precision)."""
    return variable._maybe_autocast(value)


def is_initialized(variable):
    """Whether a variable has its value. Keras makes those of a layer whose shapes it learns afterwards."""
    return variable._value is not None


def when_initialized(variable, function):
    """Calls `function()` as soon as the variable has a value: now, or where Keras makes deferred ones.

    A variable made while Keras learns shapes gets its value later, in order of creation. What is put into
    Keras' list of those has its turn after the variables made before it.
    """
    if is_initialized(variable):
        function()
        return
    deferred = types.SimpleNamespace(_deferred_initialize=function)
    register_uninitialized_variable(deferred)


@contextlib.contextmanager
def unlocked(layer):
    """Lets state be added to a layer that is built already, which Keras locks."""
    tracker = layer._tracker
    was_locked = tracker.locked
    tracker.unlock()
    try:
        yield
    finally:
        if was_locked:
            tracker.lock()


def untrack(layer, sublayer):
    """Takes a sublayer out of a layer's books; deleting the attribute alone leaves it there."""
    layer._tracker.untrack(sublayer)


def has_own_build(layer):
    """Whether the layer's class says how to build it; if not, Keras builds it by a symbolic call."""
    return not getattr(layer.build, "_is_default", False)


def is_rematerialized(layer):
    """Whether the layer's `call` runs again in the backward pass (`keras.RematScope`)."""
    return getattr(layer, "_remat_mode", None) is not None


def restored_epoch(model):
    """The epoch at which `BackupAndRestore` wants training to go on; it tells the trainer by this attribute."""
    return getattr(model, "_initial_epoch", None)


def written_resources(graph):
    """The handles from outside that a traced function may write to, in the order in which it captured them.

    TensorFlow notes with every operation, and every call of an inner function, which of its handles it only reads,
    and shows it nowhere.
    """
    read_only = {id(graph.inputs[i]) for i in get_read_only_resource_input_indices_graph(graph)}
    return [out for out, inner in graph.captures if inner.dtype == tf.resource and id(inner) not in read_only]


def are_operations_deterministic():
    """Whether `tf.config.experimental.enable_op_determinism` was called. TensorFlow has no public question."""
    return is_op_determinism_enabled()


@contextlib.contextmanager
def traced_for_xla():
    """What is traced here will be compiled by XLA, as a part of a graph that comes later.

    `tf.function(jit_compile=True)` enters this context for what it traces itself. The gradient of a loop is then made
    with lists of a fixed size, as XLA needs them.
    """
    context = XLAControlFlowContext()
    context.Enter()
    try:
        yield
    finally:
        context.Exit()


def is_cloning(operation_fn):
    """Whether `keras.models.clone_model` is rebuilding a graph: it asks neither `get_config` nor `from_config`."""
    return getattr(operation_fn, "__module__", None) == cloning.__name__


def is_branch(graph):
    """Whether a graph is that of a branch of `tf.cond`, or of a `tf.while_loop`, and not of a function: what is made
    in the graph around it is made in the same call. There is no public question."""
    return isinstance(graph, branches.CondBranchFuncGraph | branches.WhileBodyFuncGraph | branches.WhileCondFuncGraph)
