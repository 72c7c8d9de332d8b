"""The private names of Keras that losses, metrics and steps need: each fails when Keras changes it."""

import contextlib
import copy
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfloop import _keras, names


def compiled(**compile_arguments):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, [layers.Dense(1, name="a")(inputs), layers.Dense(1, name="b")(inputs)])
    model.compile("sgd", ["mse", "mae"], **compile_arguments)
    return model


def test_every_layer_and_operation_call_goes_through_operation_call():
    seen = []

    class Observer:
        def enter(self, operation):
            seen.append(("enter", operation.name))

        def leave(self, operation):
            seen.append(("leave", operation.name))

        def record(self, operation, outputs):
            seen.append(("record", operation.name, outputs.shape))

    x = keras.Input((3,))
    model = keras.Model(x, ops.mean(layers.Dense(2, name="dense")(x), axis=1), name="model")
    with _keras.observing_calls(lambda: [Observer()]):
        model(np.ones((4, 3)))
    mean = model.operations[-1].name
    assert [s[:2] for s in seen if s[0] == "record"] == [("record", n) for n in ("dense", mean, "model")]
    assert seen[0] == ("enter", "model")


@pytest.mark.parametrize("graph", [False, True])
def test_vectorized_map_traces_its_function_on_one_example(graph):
    seen = []

    def double(row):
        seen.append((_keras.maps_entered(), *row.shape))
        return 2.0 * row

    function = lambda x: ops.vectorized_map(double, x)
    before = tf.vectorized_map
    with _keras.noticing_maps():
        result = (tf.function(function) if graph else function)(tf.ones((4, 3)))
        assert _keras.maps_entered() == 0
    assert set(seen) == {(1, 3)} and tf.vectorized_map is before
    np.testing.assert_array_equal(result, 2 * np.ones((4, 3)))


def test_the_outermost_call_is_known():
    seen = []

    class Sees(layers.Layer):
        def call(self, x):
            seen.append(_keras.called_layer())
            return x

    model = keras.Sequential([layer := Sees()])
    for called in (model, layer):
        called(np.ones((1, 2)))
        assert seen[-1] is called
    assert _keras.called_layer() is None


def test_bookkeeping_attributes_hide_no_layer_and_show_no_other():
    sequential = keras.Sequential([layers.Dense(2, name="d")])
    sequential(np.ones((1, 2)))
    functional = keras.Model(sequential.inputs, sequential.outputs)
    functional.compile("sgd", "mse")
    for model in (sequential, functional):
        assert list(names.layer_names(model).values()) == ["d"]


def test_compiled_metric_names_and_output_losses():
    model = compiled(metrics=[["mse", "mae"], ["mse"]])
    assert set(_keras.compiled_metric_names(model)) == {"a_mse", "a_mae", "b_mse"}  # before the metrics are made
    data = np.ones((2, 3)), [np.ones((2, 1)), np.ones((2, 1))]
    logs = model.evaluate(*data, verbose=0, return_dict=True)
    losses = [m.name for m in _keras.compiled_output_losses(model)]
    assert losses == ["a_loss", "b_loss"] == _keras.compiled_loss_names(model)
    assert set(_keras.compiled_metric_names(model)) == {"a_mse", "a_mae", "b_mse"} == set(logs) - {"loss", *losses}
    assert _keras.compiled_metric_names(keras.Sequential()) == ()


GIVEN = {
    "names": {"metrics": [["mse", "mae"], []]},
    "objects": {"metrics": [[keras.metrics.MeanSquaredError(name="m")], [keras.metrics.mean_absolute_error]]},
    "a dict": {"metrics": {"b": "mse"}, "weighted_metrics": {"b": ["mse", "mae"]}},
    "a dict in another order": {"metrics": {"b": "mse", "a": "mae"}},
    "weighted": {"weighted_metrics": [["mse"], None]},
}


@pytest.mark.parametrize("given", GIVEN)
def test_the_names_of_compiled_metrics_are_known_before_they_are_made(given):
    model = compiled(**GIVEN[given])
    before = _keras.compiled_metric_names(model)
    model.evaluate(np.ones((2, 3)), [np.ones((2, 1)), np.ones((2, 1))], verbose=0)
    assert before == _keras.compiled_metric_names(model)


@pytest.mark.parametrize(
    "loss", ["mse", ["mse", "mae"], {"b": "mse", "a": "mae"}], ids=["one", "several", "in another order"]
)
def test_the_names_of_losses_of_several_outputs_are_known_before_they_are_made(loss):
    names = ["a_loss", "b_loss"]
    model = compiled()
    model.compile("sgd", loss)
    assert _keras.compiled_loss_names(model) == names
    model.evaluate(np.ones((2, 3)), [np.ones((2, 1)), np.ones((2, 1))], verbose=0)
    assert _keras.compiled_loss_names(model) == names
    one = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    one.compile("sgd", "mse")
    assert _keras.compiled_loss_names(one) == []


def test_regularizers_of_weights_and_activities_are_found():
    def dense(**options):
        return keras.Sequential([keras.Input((2,)), layers.Dense(1, **options)])

    assert not _keras.has_regularizer(dense())
    assert _keras.has_regularizer(dense(bias_regularizer="l2"))
    assert _keras.has_regularizer(dense(activity_regularizer="l2"))


def test_tracked_layers_and_own_metrics():
    class Holder(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = layers.Dense(1)
            self.many = [keras.metrics.Mean(name="m")]
            self.one = keras.metrics.Sum(name="s")

    holder = Holder()
    assert _keras.tracked_layers(holder) == [holder.inner]
    assert [m.name for m in _keras.own_metrics(holder)] == ["m", "s"]


def test_compiled_metrics_are_loss_then_metrics_then_a_tracker_per_output():
    model = compiled(metrics=[["mse"], ["mae"]])
    model.evaluate(np.ones((2, 3)), [np.ones((2, 1))] * 2, verbose=0)
    assert [m.name for m in _keras.compiled_metrics(model)] == ["loss", "compile_metrics", "a_loss", "b_loss"]
    assert _keras.loss_tracker(model) is model.metrics[0]
    assert _keras.compiled_metrics(keras.Sequential()) == []


def test_output_losses_come_apart_weighted():
    model = compiled(loss_weights=[1.0, 3.0])
    y, p = [np.zeros((2, 1), "float32")] * 2, [np.ones((2, 1), "float32"), np.full((2, 1), 2.0, "float32")]
    model._compile_loss.build(y, p)
    with _keras.separate_output_losses(model) as parts:
        total = model._compile_loss(y, p)
    assert [(name, float(value)) for name, value in parts] == [("a", 1.0), ("b", 6.0)]
    assert float(total) == 7.0


@pytest.mark.parametrize("given", ["specs", "a batch", "ragged specs"])
def test_build_makes_every_variable(given):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x.to_tensor(shape=(4, 3)) if given == "ragged specs" else x)

    model = Net()
    model.compile("adam", "mse", metrics=["mae"])
    x = {"specs": tf.TensorSpec((4, 3)), "a batch": tf.ones((4, 3)), "ragged specs": tf.RaggedTensorSpec((4, None))}
    y = tf.ones((4, 2)) if given == "a batch" else tf.TensorSpec((4, 2))
    assert not _keras.is_built(model)
    _keras.build(model, (x[given], y))
    assert _keras.is_built(model)
    assert model.dense.built and model.optimizer.built
    assert len(model.metrics_variables) > 1


def test_the_trainable_flag_of_one_layer():
    block = keras.Sequential([layers.Dense(2)])
    block(np.ones((1, 2)))
    dense = block.layers[0]
    _keras.set_trainable_flag(block, False, [])
    assert not block.trainable and dense.trainable
    _keras.set_trainable_flag(dense, False, [(v, False) for v in _keras.own_trainable_variables(dense)])
    assert not dense.kernel.trainable and dense.kernel in _keras.own_trainable_variables(dense)


def test_results_carry_their_metric_also_a_copys():
    metric = keras.metrics.Mean(name="m")
    _keras.mark_results(metric)
    _keras.mark_results(metric)
    assert _keras.metric_of(metric(2.0)) == (metric, ())
    assert _keras.metric_of(tf.constant(1.0)) is None
    twin = copy.deepcopy(metric)
    _keras.mark_results(twin)
    assert _keras.metric_of(twin(3.0))[0] is twin


def test_updates_are_told():
    metric, told = keras.metrics.Mean(), []
    _keras.mark_results(metric)

    @contextlib.contextmanager
    def tell(metric):
        before = float(metric.count)
        yield
        told.append((metric, float(metric.count) - before))

    with _keras.observing_updates(tell):
        metric.update_state(1.0)
        metric(2.0)
    metric.update_state(3.0)
    assert told == [(metric, 1.0), (metric, 1.0)]
    assert float(metric.result()) == 2.0


@pytest.mark.parametrize("call", ["apply", "apply_gradients"])
@pytest.mark.parametrize("scaled", [False, True])
def test_applies_are_told_once(call, scaled):
    variable = keras.Variable([1.0, 2.0])
    optimizer = keras.optimizers.SGD(1.0)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)
    told = []
    before = keras.optimizers.Optimizer.apply
    with _keras.observing_applies(lambda o, g, v: told.append((o, g, v))):
        gradient = tf.constant([4.0, 4.0])
        if call == "apply":
            optimizer.apply([gradient], [variable])
        else:
            optimizer.apply_gradients([(gradient, variable)])
    assert len(told) == 1
    assert told[0][0] is optimizer and list(told[0][2]) == [variable]
    np.testing.assert_allclose(variable, [0.0, 1.0] if scaled else [-3.0, -2.0])
    assert keras.optimizers.Optimizer.apply is before
    for scale in (_keras.loss_scale(optimizer), _keras.gradient_scale(optimizer)):
        assert float(scale) == 4.0 if scaled else scale is None


def test_a_fixed_loss_scale_is_what_apply_divides_by():
    variable = keras.Variable([1.0, 2.0])
    optimizer = keras.optimizers.SGD(1.0, loss_scale_factor=4.0)
    assert float(_keras.loss_scale(optimizer)) == _keras.gradient_scale(optimizer) == 4.0
    optimizer.apply([tf.constant([4.0, 4.0])], [variable])
    np.testing.assert_allclose(variable, [0.0, 1.0])


def test_in_call():
    seen = []

    class Asking(layers.Layer):
        def call(self, x):
            seen.append(_keras.in_call())
            return x

    assert not _keras.in_call()
    Asking()(np.ones((1, 2)))
    assert seen == [True] and not _keras.in_call()


def test_patches_of_several_threads_end_when_the_last_does():
    class Owner:
        def method(self):
            return 1

    outer = _keras.patched(Owner, "method", lambda original: lambda self: original(self) + 1)
    with outer:
        with _keras.patched(Owner, "method", lambda original: lambda self: original(self) + 1):
            assert Owner().method() == 2
        assert Owner().method() == 2
    assert Owner().method() == 1


def test_functional_is_what_a_model_of_inputs_and_outputs_is():
    x = keras.Input((2,))
    assert type(keras.Model(x, layers.Dense(1)(x))) is _keras.Functional


def test_compiled_metrics_hold_the_users_metric_objects():
    accuracy = keras.metrics.BinaryAccuracy(name="accuracy")
    model = compiled(metrics=[[accuracy], []])
    model.evaluate(np.ones((2, 3)), [np.ones((2, 1))] * 2, verbose=0)
    assert accuracy in _keras.inner_metrics(model.metrics[1])
    assert _keras.inner_metrics(accuracy) == []


def test_an_optimizer_knows_its_strategy():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    assert _keras.optimizer_strategy(optimizer) is tf.distribute.get_strategy()


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"use_ema": True, "ema_overwrite_frequency": 2}, {"gradient_accumulation_steps": 2}],
)
def test_updates_of_replicas_are_those_of_the_optimizer(options):
    values = []
    for context in (contextlib.nullcontext, _keras.updates_of_replicas):
        variable = keras.Variable([1.0, -2.0, 3.0])
        optimizer = keras.optimizers.Adam(0.1, **options)
        with context():
            for step in range(4):
                optimizer.apply([tf.constant([0.1, 0.2, -0.3]) * (step + 1)], [variable])
        values.append(variable.numpy())
    np.testing.assert_array_equal(*values)


def test_every_part_of_an_update_that_leaves_a_replica_is_replaced(monkeypatch):
    """What Keras calls to leave a replica is not called."""

    def left(*args):
        raise AssertionError("it left the replica")

    monkeypatch.setattr(tf.__internal__.distribute.interim, "maybe_merge_call", left)
    variable = keras.Variable([1.0])
    optimizer = keras.optimizers.AdamW(0.1, use_ema=True, ema_overwrite_frequency=1)
    optimizer.build([variable])
    with pytest.raises(AssertionError, match="left"):
        optimizer.apply([tf.constant([1.0])], [variable])
    with _keras.updates_of_replicas():
        optimizer.apply([tf.constant([1.0])], [variable])


def test_losses_are_scaled_by_the_functions_that_are_replaced(monkeypatch):
    called = []
    monkeypatch.setattr(_keras.loss_module, "scale_loss_for_distribution", lambda v: called.append(1) or v)
    keras.losses.MeanSquaredError()(np.ones((2, 1)), np.zeros((2, 1)))
    assert called
    with _keras.losses_unscaled():
        called.clear()
        keras.losses.MeanSquaredError()(np.ones((2, 1)), np.zeros((2, 1)))
    assert not called


def test_another_thread_gets_the_seed_generator_and_the_policy():
    found = []

    def other():
        _keras.take_process_state(state)
        found.append((_keras.global_seed_generator(), keras.config.dtype_policy().name))

    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        state = _keras.process_state()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    finally:
        keras.config.set_dtype_policy("float32")
    assert found == [(_keras.global_seed_generator(), "mixed_bfloat16")]


def test_assigned_variables_are_told():
    seen = []
    variable = keras.Variable(1.0)
    with _keras.observing_assigns(seen.append):
        variable.assign_add(1.0)
        variable.assign(5.0)
    variable.assign(6.0)
    assert [v is variable for v in seen] == [True, True]


def test_the_graphs_of_branches_and_loops_are_told_from_those_of_functions():
    seen = []

    def see():
        graph = tf.compat.v1.get_default_graph()
        seen.append((_keras.is_branch(graph), graph.outer_graph))
        return 0.0

    @tf.function
    def function(n):
        tf.function(see)()
        tf.cond(n > 0, see, lambda: 0.0)
        tf.while_loop(lambda i: i + see() < 1.0, lambda i: i + 1.0 + see(), (0.0,))

    graph = function.get_concrete_function(tf.constant(1)).graph
    assert [branch for branch, _ in seen] == [False, True, True, True]
    assert all(outer is graph for _, outer in seen)
    assert not _keras.is_branch(graph)


def test_a_gradient_of_a_loop_traced_for_xla_is_compiled_within_a_later_graph():
    variable = tf.Variable(2.0)

    def gradient():
        with _keras.traced_for_xla(), tf.GradientTape() as tape:
            _, y = tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y * variable), (0, 1.0), maximum_iterations=3)
        return tape.gradient(y, variable)

    traced = tf.function(gradient, autograph=False).get_concrete_function()
    assert float(tf.function(lambda: traced(), jit_compile=True)()) == 12.0


def test_written_resources_are_those_that_a_function_or_one_within_it_writes():
    read, written, within = (tf.Variable(1.0) for _ in range(3))
    inner = tf.function(lambda: within.assign_add(read))

    @tf.function
    def outer(x):
        written.assign(x * read)
        return tf.cond(x > 0, inner, lambda: x)

    graph = outer.get_concrete_function(tf.TensorSpec(())).graph
    handles = _keras.written_resources(graph)
    assert {id(h) for h in handles} == {id(written.handle), id(within.handle)}


@pytest.mark.parametrize("metric", [keras.metrics.F1Score, keras.metrics.R2Score])
def test_some_metrics_know_that_they_have_no_variables_yet(metric):
    made = metric()
    assert not _keras.is_metric_built(made) and _keras.is_metric_built(keras.metrics.Mean())
    made.update_state(np.ones((2, 1), "float32"), np.ones((2, 1), "float32"))
    assert _keras.is_metric_built(made)
