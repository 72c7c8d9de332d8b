"""What the numbers in a log mean: sums, weights, order, names, resets and precision.

Almost everything is computed by hand: the examples are 0 to 9, in batches of 4, 4 and 2, and the models predict
their input, as long as the learning rate is 0.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfloop

X = np.arange(10, dtype="float32")[:, None]
ZEROS = np.zeros((10, 1), "float32")
MODES = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False, "steps_per_execution": 1},
    "three": {"jit_compile": False, "steps_per_execution": 3},
    "step": {"jit_compile": True},
    "loop": {"jit_compile": "loop"},
    "auto": {},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


class Calling(tfloop.Model):
    """Predicts its input, after `call(model, x, training)`."""

    def __init__(self, call, name="model", **attributes):
        super().__init__(name=name)
        self._inner_call = call
        for attribute, value in attributes.items():
            setattr(self, attribute, value)
        self.out = layers.Dense(1, use_bias=False, kernel_initializer="ones")

    def call(self, x, training=None):
        self._inner_call(self, x, training)
        return self.out(x)


class Adds(tfloop.Layer):
    """Returns its input, after `call(layer, x)`."""

    def __init__(self, call, name=None, **attributes):
        super().__init__(name=name)
        self._inner_call = call
        for attribute, value in attributes.items():
            setattr(self, attribute, value)

    def call(self, x):
        self._inner_call(self, x)
        return x


def metric(name, factor=1.0):
    return lambda owner, x, training=None: owner.add_metric(factor * ops.mean(x), name=name)


def functional(*through, name="model", regularizer=None):
    inputs = outputs = keras.Input((1,))
    for layer in through:
        outputs = layer(outputs)
    last = layers.Dense(1, use_bias=False, kernel_initializer="ones", kernel_regularizer=regularizer, name="last")
    return tfloop.Model(inputs, last(outputs), name=name)


def compiled(model, loss="mae", rate=0.0, **options):
    model.compile(keras.optimizers.SGD(rate), loss, **options)
    return model


def fit(model, y=ZEROS, x=X, epochs=1, **options):
    history = model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **options).history
    return history if epochs > 1 else {name: values[0] for name, values in history.items()}


def evaluate(model, y=ZEROS, x=X, **options):
    return model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True, **options)


def assert_logs(logs, **expected):
    assert list(logs) == list(expected)
    np.testing.assert_allclose([logs[n] for n in expected], list(expected.values()), rtol=1e-6, atol=1e-6)


# The loss is the sum of its parts.

# What each kind of loss contributes. The weight of the registered one grows by 1 a step.
PARTS = {
    "compiled": ("compiled_loss", 4.5),
    "named": ("named", 9.0),
    "unnamed": ("other_losses", 28.5),
    "symbolic": ("symbolic", 2.25),
    "registered": ("registered", (4 * 1 * 1.5 + 4 * 2 * 5.5 + 2 * 3 * 8.5) / 10),
    "regularizer": ("other_losses", 0.5),
}
COMBINATIONS = [*itertools.combinations(PARTS, 1), *itertools.combinations(PARTS, 2), tuple(PARTS)]


def with_losses(kinds, **options):
    def call(layer, x):
        if "named" in kinds:
            layer.add_loss(2 * ops.mean(x), name="named")
        if "unnamed" in kinds:
            layer.add_loss(ops.mean(x**2))

    model = functional(Adds(call), regularizer=keras.regularizers.L2(0.5) if "regularizer" in kinds else None)
    if "symbolic" in kinds:
        model.add_loss(ops.abs(model.output), name="symbolic", weight=0.5)
    if "registered" in kinds:
        model.add_loss(
            lambda t: ops.mean(t["y_pred"]), name="registered", weight=lambda step: tf.cast(step + 1, tf.float32)
        )
    if not {"compiled", "symbolic", "registered", "regularizer"} & set(kinds):
        model.add_loss(lambda t: 0 * ops.mean(t["y_pred"]))  # something that the weight has to do with
    return compiled(model, "mae" if "compiled" in kinds else None, **options)


def expected_parts(kinds):
    expected = {}
    for kind in kinds:
        name, value = PARTS[kind]
        expected[name] = expected.get(name, 0) + value
    return expected


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
def test_the_loss_is_the_sum_of_its_parts_on_uneven_batches(kinds):
    logs = fit(with_losses(kinds), ZEROS if "compiled" in kinds else None)
    expected = expected_parts(kinds)
    assert logs.pop("loss") == pytest.approx(sum(expected.values()), rel=1e-6)
    shown = {name: value for name, value in logs.items() if value}
    assert shown == pytest.approx(expected if len(logs) > 1 else {}, rel=1e-6)


@every_mode
def test_all_parts_of_a_loss_in_every_mode(mode):
    model = with_losses(PARTS, **mode)
    expected = expected_parts(PARTS)
    logs = fit(model, validation_data=(X, ZEROS))
    training = {name: value for name, value in logs.items() if not name.startswith("val_")}
    assert training == pytest.approx({"loss": sum(expected.values()), **expected}, rel=1e-6)
    expected["registered"] = 4 * 4.5  # three updates are done
    validation = {name.removeprefix("val_"): value for name, value in logs.items() if name.startswith("val_")}
    assert validation == pytest.approx({"loss": sum(expected.values()), **expected}, rel=1e-6)


def test_one_part_is_not_shown_beside_the_loss():
    assert_logs(fit(compiled(functional())), loss=4.5)


def test_parts_of_several_outputs_are_named_after_them_as_they_enter_the_sum():
    inputs = keras.Input((1,))
    a = layers.Dense(1, use_bias=False, kernel_initializer="ones", name="a")(inputs)
    b = layers.Dense(1, use_bias=False, kernel_initializer="ones", name="b")(inputs)
    model = compiled(tfloop.Model(inputs, {"a": a, "b": b}), {"a": "mae", "b": "mse"}, loss_weights={"a": 2, "b": 0.5})
    model.add_loss(lambda t: 3.0 + 0 * ops.mean(t["a"]), name="three")
    expected = {"loss": 9 + 14.25 + 3, "a_loss": 9, "b_loss": 14.25, "three": 3}
    assert_logs(fit(model, {"a": ZEROS, "b": ZEROS}), **expected)


def test_sample_weights_enter_the_compiled_loss_and_no_other():
    model = with_losses(("compiled", "named"))
    logs = fit(model, sample_weight=X[:, 0])
    assert_logs(logs, loss=28.5 + 9, compiled_loss=28.5, named=9.0)


def test_one_name_in_several_calls_of_a_layer_is_one_part():
    def call(model, x, training):
        model.layer(x)
        model.layer(2 * x)

    model = Calling(call, layer=Adds(lambda layer, x: layer.add_loss(ops.mean(x), name="mean")))
    assert_logs(fit(compiled(model)), loss=4.5 + 13.5, compiled_loss=4.5, mean=13.5)


def test_losses_that_a_layer_below_another_model_adds_are_parts_too():
    inner = Calling(lambda model, x, training: model.add_loss(ops.mean(x), name="inner"))
    inner.add_loss(lambda t: 2 * ops.mean(t["y_pred"]), name="registered")
    assert_logs(fit(compiled(functional(inner))), loss=18.0, compiled_loss=4.5, inner=4.5, registered=9.0)


def test_a_product_of_a_number_and_a_symbolic_loss_is_a_loss():
    model = functional()
    model.add_loss(0.25 * ops.mean(model.output))
    model.add_loss(2 * ops.mean(model.output) + 3 * ops.mean(model.output**2), name="sum")
    assert_logs(fit(compiled(model, None), None), loss=95.625, sum=94.5, other_losses=1.125)


def test_a_loss_that_is_no_scalar_is_averaged_in_value_and_gradient():
    def trained(loss):
        model = functional()
        model.add_loss(loss)
        logs = fit(compiled(model, None, rate=0.01), None)
        return logs["loss"], float(model.get_weights()[0][0, 0])

    expected = trained(lambda t: ops.mean(t["y_pred"]))
    assert trained(lambda t: t["y_pred"]) == pytest.approx(expected, rel=1e-6)
    assert trained(lambda t: t["y_pred"][:, 0]) == pytest.approx(expected, rel=1e-6)
    assert expected[1] == pytest.approx(1 - 0.01 * (1.5 + 5.5 + 8.5), rel=1e-6)


def test_vectors_added_in_call_and_as_symbolic_tensors_have_the_gradient_of_their_mean():
    def trained(model, **options):
        fit(compiled(model, None, rate=0.01), None)
        return float(model.get_weights()[0][0, 0])

    symbolic = functional()
    symbolic.add_loss(symbolic.output)
    in_call = Calling(lambda model, x, training: model.add_loss(model.out(x)))
    expected = 1 - 0.01 * (1.5 + 5.5 + 8.5)
    assert [trained(symbolic), trained(in_call)] == pytest.approx([expected, expected], rel=1e-6)


# Averages over the epoch.


@every_mode
def test_scalars_are_weighted_by_the_size_of_their_batch(mode):
    model = compiled(functional(Adds(metric("in_layer"))), **mode)
    model.add_metric(lambda t: ops.mean(t["x"]), name="registered")
    model.add_metric(lambda t: t["x"], name="matrix")
    expected = {"loss": 4.5, "registered": 4.5, "matrix": 4.5, "in_layer": 4.5}
    assert_logs(fit(model), **expected)
    assert_logs(evaluate(model), **expected)


def test_results_of_metric_objects_keep_their_own_weighting():
    def call(layer, x):
        layer.add_metric(layer.by_batch(ops.mean(x)))

    model = compiled(functional(Adds(call, by_batch=keras.metrics.Mean(name="by_batch"))), metrics=["mse"])
    assert_logs(fit(model), loss=4.5, mse=28.5, by_batch=(1.5 + 5.5 + 8.5) / 3)


@pytest.mark.parametrize(
    ("aggregation", "value"), [("mean", 4.5), (None, 4.5), ("sum", 45), ("min", 0), ("max", 9), ("last", 8.5)]
)
def test_every_aggregation_is_done_over_elements_calls_and_steps(aggregation, value):
    model = compiled(Calling(lambda model, x, training: model.add_metric(x, name="m", aggregation=aggregation)))
    model.add_metric(lambda t: t["x"], name="registered", aggregation=aggregation)
    logs = fit(model)
    assert (logs["m"], logs["registered"]) == pytest.approx((value, value), rel=1e-6)


def test_batch_logs_are_running_values_and_the_last_is_the_epoch_s():
    seen = []
    model = compiled(functional(Adds(metric("m"))), metrics=["mse"])
    show = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs))
    history = fit(model, callbacks=[show])
    assert [logs["m"] for logs in seen] == pytest.approx([1.5, 3.5, 4.5], rel=1e-6)
    assert [list(logs) for logs in seen] == [list(history)] * 3
    assert seen[-1] == pytest.approx(history)


def large(owner, x, training=None):
    for aggregation in ("mean", "min", "max", "last", "sum"):
        owner.add_metric(tf.boolean_mask(x, x > 5.0), name=aggregation, aggregation=aggregation)


NOT_COMPILED = pytest.mark.parametrize("mode", [MODES[m] for m in ("eager", "graph", "three")])


@NOT_COMPILED
def test_a_value_of_no_elements_is_left_out(mode):
    """Of 0 to 3 none is larger than 5, of 4 to 7 the mean is 6.5, of 8 and 9 it is 8.5."""
    expected = {"mean": (6.5 * 4 + 8.5 * 2) / 6, "min": 6.0, "max": 9.0, "last": 8.5, "sum": 30.0}
    assert_logs(fit(compiled(Calling(large), **mode)), loss=4.5, **expected)
    assert "mean" not in compiled(Calling(large), **mode).evaluate(X[:4], ZEROS[:4], verbose=0, return_dict=True)
    infinite = compiled(Calling(lambda model, x, training: model.add_metric(x / 0.0, name="m")), **mode)
    assert np.isnan(fit(infinite)["m"])


@NOT_COMPILED
def test_a_value_of_no_elements_is_left_out_of_several_batches_for_one_update(mode):
    model = compiled(Calling(large), accumulate=3, **mode)
    logs = fit(model)
    expected = {"mean": (6.5 * 4 + 8.5 * 2) / 6, "min": 6.0, "max": 9.0, "last": 8.5, "sum": 30.0}
    assert_logs(logs, loss=4.5, **expected)


@NOT_COMPILED
def test_a_metric_in_a_branch_that_was_never_taken_is_left_out(mode):
    def call(model, x, training):
        def add():
            model.add_metric(ops.mean(x), name="large")
            return 0.0

        tf.cond(ops.mean(x) > 5.0, add, lambda: 0.0)

    model = compiled(Calling(call), **mode)
    logs = fit(model, validation_data=(X[:4], ZEROS[:4]))
    assert_logs(logs, loss=4.5, large=(5.5 * 4 + 8.5 * 2) / 6, val_loss=1.5)


# Order and names.


def of_every_kind():
    def call(model, x, training):
        model.layer(x)
        model.add_loss(ops.mean(model.out(x)), name="named")
        model.add_metric(ops.mean(x), name="own")
        model.add_metric(model.tracked(x))

    def owner(layer, x):
        layer.below(x)
        layer.add_metric(ops.mean(x), name="in_layer")

    layer = Adds(owner, below=Adds(metric("below")))
    model = Calling(call, layer=layer, tracked=keras.metrics.Mean(name="tracked"))
    model.add_metric(lambda t: ops.mean(t["x"]), name="registered")
    return compiled(model, metrics=["mse", "mae"])


ORDER = ["loss", "compiled_loss", "named", "mse", "mae", "tracked", "registered", "own", "in_layer", "below"]


def test_the_order_is_loss_parts_compiled_metrics_own_metrics_and_those_of_layers():
    history = fit(of_every_kind(), validation_data=(X, ZEROS))
    assert list(history) == ORDER + [f"val_{name}" for name in ORDER]


def test_metrics_names_names_what_evaluate_returned():
    model = of_every_kind()
    values = model.evaluate(X, ZEROS, batch_size=4, verbose=0)
    as_dict = evaluate(model)
    assert model.metrics_names == list(as_dict) == ORDER
    assert dict(zip(model.metrics_names, values, strict=True)) == pytest.approx(as_dict)


def with_everything():
    model = functional(layers.Dense(1, name="dense"), regularizer="l2")
    model.add_loss(ops.mean(model.output), name="symbolic")
    model.add_loss(lambda t: 1.0 + 0.0 * ops.mean(t["dense"]), name="mae")
    model.add_metric(lambda t: ops.mean(t["dense"]), name="mse")
    model.add_metric(model.output, name="output")
    return compiled(model, metrics=["mse", "mae"])


def zipped(model):
    """The idiom: the names are asked for first."""
    return dict(zip(model.metrics_names, model.evaluate(X, ZEROS, batch_size=4, verbose=0), strict=True))


def test_metrics_names_are_those_of_an_evaluation_before_there_is_one():
    model = with_everything()
    assert zipped(model) == pytest.approx(evaluate(model))
    several = tfloop.Model(x := keras.Input((1,)), [layers.Dense(1, name=n)(x) for n in "ab"])
    several.compile("sgd", ["mse", "mae"], metrics=[["mae"], ["mse"]])
    names = several.metrics_names
    assert names == list(several.evaluate(X, [ZEROS, ZEROS], verbose=0, return_dict=True))


def test_metrics_names_follow_what_is_added_and_compiled():
    model = with_everything()
    evaluate(model)
    model.add_metric(lambda t: ops.mean(t["x"]), name="late")
    model.add_loss(lambda t: ops.mean(t["x"]), name="late_loss")
    assert zipped(model) == pytest.approx(evaluate(model))
    compiled(model, loss="mse", metrics=["mape"])
    assert zipped(model) == pytest.approx(evaluate(model))
    assert {"mape", "late"} < set(model.metrics_names)


@pytest.mark.parametrize("how", ["fit", "test_on_batch"])
def test_metrics_names_are_known_after_a_validation(how):
    model = of_every_kind()
    model.watch("out", "rms")
    model.add_metric(lambda t: ops.mean(t["gradients/out/kernel"]), name="gradient")
    if how == "fit":
        fit(model, validation_data=(X, ZEROS))
    else:
        model.test_on_batch(X, ZEROS)
    assert zipped(model) == pytest.approx(evaluate(model))


def test_two_layers_with_one_metric_name_are_shown_by_their_paths():
    model = compiled(functional(Adds(metric("m"), name="first"), Adds(metric("m", 2), name="second")))
    assert_logs(fit(model), **{"loss": 4.5, "first/m": 4.5, "second/m": 9.0})
    assert_logs(evaluate(model), **{"loss": 4.5, "first/m": 4.5, "second/m": 9.0})


def test_layers_that_share_a_metric_name_are_shown_by_their_paths_in_every_log():
    def in_training(model, x, training):
        model.both(x)
        if training:
            model.once(x)
        model.last(x)

    parts = {"both": Adds(metric("m")), "once": Adds(metric("m", 2)), "last": Adds(metric("n"))}
    model = compiled(Calling(in_training, **parts))
    logs = fit(model, validation_data=(X, ZEROS))
    expected = {"loss": 4.5, "both/m": 4.5, "once/m": 9.0, "n": 4.5}
    assert_logs(logs, **expected, **{"val_loss": 4.5, "val_both/m": 4.5, "val_n": 4.5})
    model.once.metrics[0].reset_state()
    assert "once/m" not in evaluate(model)
    assert float(model.both.metrics[0].result()) == 4.5 and float(model.once.metrics[0].result()) == 0.0


@every_mode
def test_what_compute_metrics_returns_is_shown_under_its_name(mode):
    class Own(Calling):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            logs = super().compute_metrics(x, y, y_pred, sample_weight)
            self.power.update_state(ops.mean(y_pred**2))
            return {**logs, "alias": self.power.result(), "root": ops.sqrt(self.power.result())}

    model = compiled(Own(lambda *_: None, power=keras.metrics.Mean(name="power")), metrics=["mse"], **mode)
    logs = fit(model)
    assert list(logs) == ["loss", "mse", "alias", "root", "power"]
    assert logs["alias"] == logs["power"] == pytest.approx(np.mean([np.mean(X[i : i + 4] ** 2) for i in (0, 4, 8)]))


def test_metric_objects_hold_what_the_log_shows():
    layer, other = Adds(metric("m"), name="first"), Adds(metric("m", 2), name="second")
    model = compiled(functional(layer, other))
    model.add_metric(lambda t: 100.0, name="loss")
    fit(model)
    assert [float(m.result()) for m in (layer.metrics[0], other.metrics[0])] == [4.5, 9.0]
    assert [float(m.result()) for m in model.metrics if m.name == "loss"] == [4.5, 100.0]


def test_the_model_s_own_metric_keeps_its_name_beside_a_layer_s():
    model = functional(Adds(metric("m", 2), name="layer"))
    model.add_metric(lambda t: ops.mean(t["x"]), name="m")
    assert_logs(fit(compiled(model)), **{"loss": 4.5, "m": 4.5, "layer/m": 9.0})


def test_attributes_of_two_layers_with_one_name_are_shown_by_their_paths():
    def mean(name, factor):
        return Adds(lambda l, x: l.add_metric(l.mean(factor * x)), name=name, mean=keras.metrics.Mean(name="m"))

    model = compiled(functional(mean("first", 1), mean("second", 2)))
    assert_logs(fit(model), **{"loss": 4.5, "first/m": 4.5, "second/m": 9.0})


@pytest.mark.parametrize("name", ["loss", "named", "compiled_loss", "other_losses", "mse"])
def test_what_clashes_with_the_loss_a_part_or_a_compiled_metric_gives_way(name):
    def call(layer, x):
        layer.add_loss(2 * ops.mean(x), name="named")
        layer.add_loss(0.5)
        layer.add_metric(100.0, name=name)

    model = functional(Adds(call, name="layer"))
    model.add_metric(lambda t: 200.0, name=name)
    logs = fit(compiled(model, metrics=["mse"]), validation_data=(X, ZEROS))
    expected = {"loss": 14.0, "compiled_loss": 4.5, "named": 9.0, "other_losses": 0.5, "mse": 28.5}
    expected |= {f"model/{name}": 200.0, f"layer/{name}": 100.0}
    assert_logs(logs, **expected, **{f"val_{n}": v for n, v in expected.items()})


def test_named_losses_that_clash_are_shown_by_their_paths():
    def layer(name, factor):
        return Adds(lambda layer, x: layer.add_loss(factor * ops.mean(x), name="size"), name=name)

    logs = fit(compiled(functional(layer("first", 1), layer("second", 2))))
    assert_logs(logs, **{"loss": 18.0, "compiled_loss": 4.5, "first/size": 4.5, "second/size": 9.0})


@pytest.mark.parametrize("name", ["loss", "compiled_loss", "other_losses"])
def test_a_named_loss_with_a_name_of_the_log_s_own_gives_way(name):
    def call(layer, x):
        layer.add_loss(2 * ops.mean(x), name=name)
        layer.add_loss(0.5)

    logs = fit(compiled(functional(Adds(call, name="layer"))))
    assert logs["loss"] == pytest.approx(14.0)
    assert logs["compiled_loss"] == pytest.approx(4.5)
    assert logs["other_losses"] == pytest.approx(0.5)
    assert sorted(v for n, v in logs.items() if n.endswith(f"/{name}")) == pytest.approx([9.0])


def test_a_named_loss_with_the_name_of_a_compiled_metric_gives_way():
    model = functional()
    model.add_loss(lambda t: 5.0 + 0.0 * ops.mean(t["y_pred"]), name="mse")
    expected = {"loss": 9.5, "compiled_loss": 4.5, "model/mse": 5.0, "mse": 28.5}
    logs = fit(compiled(model, metrics=["mse"]), validation_data=(X, ZEROS))
    assert_logs(logs, **expected, **{f"val_{n}": v for n, v in expected.items()})


def test_a_named_loss_with_the_name_of_a_compiled_metric_of_one_output_gives_way():
    inputs = keras.Input((1,))
    outputs = [layers.Dense(1, use_bias=False, kernel_initializer="ones", name=n)(inputs) for n in "ab"]
    model = tfloop.Model(inputs, outputs, name="model")
    model.add_loss(lambda t: 5.0 + 0.0 * ops.mean(t["a"]), name="a_mse")
    model.compile(keras.optimizers.SGD(0.0), ["mae", "mae"], metrics=[["mse"], ["mse"]])
    logs = model.evaluate(X, [ZEROS, ZEROS], batch_size=4, verbose=0, return_dict=True)
    parts = {"loss": 14.0, "a_loss": 4.5, "b_loss": 4.5, "model/a_mse": 5.0}
    assert logs == pytest.approx({**parts, "a_mse": 28.5, "b_mse": 28.5}, rel=1e-6)


def own_compute_loss(mode=None):
    class Own(Calling):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.mean(ops.abs(y_pred - y)) + sum(self.losses)

    def call(model, x, training):
        model.add_loss(2 * ops.mean(x), name="named")

    model = Own(call)
    model.compile(keras.optimizers.SGD(0.0), **(mode or {}))
    return model


@every_mode
def test_losses_that_an_overridden_compute_loss_sums_are_shown(mode):
    model = own_compute_loss(mode)
    assert_logs(fit(model), loss=13.5, named=9.0, other_losses=4.5)
    model.add_loss(lambda t: 3 * ops.mean(t["x"]), name="registered")
    assert_logs(fit(model), loss=27.0, named=9.0, registered=13.5, other_losses=4.5)


@every_mode
def test_of_two_calls_in_a_step_the_losses_are_those_that_keras_keeps(mode):
    class Twice(Calling):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                self(x, training=True)
                base = ops.mean(ops.abs(self(2 * x, training=True) - y))
                loss = base + sum(self.losses)  # Keras clears those of the first call when the second begins
            self.minimize(loss, self.trainable_variables, tape=tape)
            return {"loss": loss, "base": base}

    model = Twice(lambda model, x, training: model.add_loss(ops.mean(x), name="named"))
    model.compile(keras.optimizers.SGD(0.0), **mode)
    assert_logs(fit(model), loss=18.0, base=9.0, named=9.0)


@pytest.mark.parametrize("floatx", ["float32", "float64"])
def test_losses_of_several_float_types_add_up(floatx):
    keras.config.set_floatx(floatx)
    try:

        def call(layer, x):
            layer.add_loss(2 * ops.mean(ops.cast(x, "float64")), name="double")
            layer.add_loss(ops.mean(ops.cast(x, "float16")), name="half")
            layer.add_loss(0.25)
            layer.add_loss(ops.cast(0.25, "float64"))

        model = functional(Adds(call, name="layer"))
        model.add_loss(lambda t: np.float32(1.0), name="single")
        logs = fit(compiled(model))
        assert_logs(logs, loss=19.5, compiled_loss=4.5, double=9.0, half=4.5, single=1.0, other_losses=0.5)
    finally:
        keras.config.set_floatx("float32")


def test_two_metrics_of_one_name_in_one_place_are_an_error():
    model = functional()
    model.add_metric(lambda t: 1.0, name="m")
    with pytest.raises(ValueError, match="'m'"):
        model.add_metric(lambda t: 2.0, name="m")
    with pytest.raises(ValueError, match="'m'"):
        model.add_metric(model.output, name="m")
    in_call = Calling(lambda model, x, training: model.add_metric(1.0, name="m"))
    in_call.add_metric(lambda t: 2.0, name="m")
    with pytest.raises(ValueError, match="'m'"):
        fit(compiled(in_call))


# What only training has.


@every_mode
def test_a_metric_that_does_not_occur_in_evaluation_is_left_out(mode):
    def call(model, x, training):
        if training:
            model.add_metric(ops.mean(x), name="in_training")

    model = compiled(Calling(call), **mode)
    model.add_metric(lambda t: ops.sum(t["gradients/out/kernel"] ** 2), name="of_gradients")
    logs = fit(model, validation_data=(X, ZEROS))
    assert list(logs) == ["loss", "of_gradients", "in_training", "val_loss"]
    assert_logs(evaluate(model), loss=4.5)


def test_an_attribute_metric_that_evaluation_does_not_update_is_left_out():
    def call(model, x, training):
        if training:
            model.mean.update_state(x)

    model = compiled(Calling(call, mean=keras.metrics.Mean(name="seen")))
    assert list(fit(model, validation_data=(X, ZEROS))) == ["loss", "seen", "val_loss"]


def test_a_loss_that_only_training_adds_is_no_part_in_evaluation():
    def call(model, x, training):
        if training:
            model.add_loss(2 * ops.mean(model.out(x)), name="extra")

    logs = fit(compiled(Calling(call)), validation_data=(X, ZEROS))
    assert_logs(logs, loss=13.5, compiled_loss=4.5, extra=9.0, val_loss=4.5)


# Prediction, resets.


class PredictsIn(keras.callbacks.Callback):
    def __init__(self, model):
        super().__init__()
        self._part = model

    def on_train_batch_end(self, batch, logs=None):
        self._part.predict(100 * X, verbose=0)


@pytest.mark.parametrize("predict_on", ["the model", "a part of it"])
def test_predict_changes_no_metric_in_the_middle_of_an_epoch(predict_on):
    def call(layer, x):
        metric("m")(layer, x)
        layer.add_metric(layer.mean(ops.mean(x)))

    layer = Adds(call, mean=keras.metrics.Mean(name="object"))
    model = compiled(functional(layer), metrics=["mse"])
    other = compiled(tfloop.Model(model.input, layer.output)) if predict_on == "a part of it" else model
    logs = fit(model, callbacks=[PredictsIn(other)])
    assert_logs(logs, loss=4.5, mse=28.5, object=(1.5 + 5.5 + 8.5) / 3, m=4.5)


def test_predict_leaves_metric_objects_as_they_are():
    model = compiled(functional(Adds(metric("m"))), metrics=["mse"])
    fit(model)
    before = {m.name: m.result() for m in model.metrics if m.name in ("loss", "m")}
    model.predict(100 * X, verbose=0)
    model.predict_on_batch(100 * X)
    assert {m.name: m.result() for m in model.metrics if m.name in ("loss", "m")} == before


class HidesItsMetrics(Calling):
    @property
    def metrics(self):
        return []


@every_mode
def test_metrics_are_reset_also_where_metrics_is_overridden(mode):
    def call(model, x, training):
        model.add_metric(model.mean(x))
        model.add_metric(x, name="named")

    model = HidesItsMetrics(call, mean=keras.metrics.Mean(name="mean"))
    history = fit(compiled(model, **mode), epochs=3, validation_data=(X[:4], ZEROS[:4]))
    assert history["mean"] == pytest.approx([4.5] * 3, rel=1e-6)
    assert history["val_mean"] == pytest.approx([1.5] * 3, rel=1e-6)
    assert history["val_named"] == pytest.approx([1.5] * 3, rel=1e-6)


def test_validation_does_not_touch_the_epoch_s_training_values():
    history = fit(of_every_kind(), epochs=2, validation_data=(X[:2], ZEROS[:2]))
    assert history["in_layer"] == pytest.approx([4.5, 4.5], rel=1e-6)
    assert history["val_in_layer"] == pytest.approx([0.5, 0.5], rel=1e-6)


# Precision, weights and gradients.


def test_metrics_are_float32_at_least_in_mixed_precision():
    def call(layer, x):
        big = 60000.0 * ops.ones((64,), "float16")
        layer.add_metric(big, name="vector")  # a sum of these is infinite in float16
        layer.add_metric(big, name="total", aggregation="sum")
        layer.add_metric(ops.cast(1000.0, "float16"), name="scalar")
        layer.add_loss(ops.cast(x, "float16") * 0 + 30000.0, name="loss_vector")

    layer = Adds(call)
    layer.dtype_policy = keras.DTypePolicy("mixed_float16")
    logs = fit(compiled(functional(layer)))
    assert logs["vector"] == pytest.approx(60000, rel=1e-3)
    assert logs["total"] == pytest.approx(3 * 64 * 60000, rel=1e-3)
    assert logs["loss_vector"] == pytest.approx(30000, rel=1e-3)


def test_int_bool_and_float64_values_are_numbers():
    def call(model, x, training):
        model.add_metric(x > 4, name="share")
        model.add_metric(ops.cast(x, "int32"), name="whole")
        model.add_metric(ops.cast(x, "float64") + 1e-12, name="double")

    assert_logs(fit(compiled(Calling(call))), loss=4.5, share=0.5, whole=4.5, double=4.5)


def test_a_metric_of_float64_keeps_its_digits():
    model = compiled(functional())
    model.add_metric(lambda t: ops.cast(1.0, "float64") + 1e-12, name="double")
    assert fit(model)["double"] == 1.0 + 1e-12


@every_mode
def test_metrics_change_no_weight_and_are_none(mode):
    def weights(with_metrics):
        def call(model, x, training):
            if with_metrics:
                model.add_metric(1e6 * ops.mean(model.out(x) ** 2), name="in_call")

        model = compiled(Calling(call), rate=0.001, **mode)
        if with_metrics:
            model.add_metric(lambda t: 1e6 * ops.mean(t["y_pred"] ** 2), name="registered")
            model.watch("*", "norm")
        fit(model, epochs=2)
        return model.get_weights()

    plain, watched = weights(False), weights(True)
    assert len(watched) == 1
    np.testing.assert_allclose(watched[0], plain[0], rtol=1e-6)


def test_losses_of_a_step_are_read_by_metrics_as_they_enter_the_sum():
    model = with_losses(tuple(PARTS))
    for name in ("symbolic", "registered", "compiled_loss"):
        model.add_metric(lambda t, name=name: t[f"losses/{name}"], name=f"again_{name}")
    logs = fit(model)
    for name in ("symbolic", "registered", "compiled_loss"):
        assert logs[f"again_{name}"] == pytest.approx(logs[name], rel=1e-6)


# Training moves the numbers as it should.


@every_mode
def test_every_mode_trains_to_the_same_logs(mode):
    def train(mode):
        model = with_losses(tuple(PARTS), rate=0.001, metrics=["mse"], **mode)
        model.add_metric(lambda t: ops.mean(t["y_pred"]), name="prediction")
        model.watch("gradients/*", "norm")
        model.watch("updates/*", "rms", every=2)
        return fit(model, epochs=2, validation_data=(X, ZEROS))

    logs, eager_logs = train(mode), train(MODES["eager"])
    assert list(logs) == list(eager_logs)
    for name, values in eager_logs.items():
        assert logs[name] == pytest.approx(values, rel=1e-6), name


def test_the_total_is_that_of_keras_own_fit():
    def model(kind):
        inputs = keras.Input((1,))
        dense = layers.Dense(1, kernel_initializer="ones", kernel_regularizer="l2")
        return kind(inputs, dense(layers.ActivityRegularization(l1=0.1)(inputs)))

    ours, theirs = (fit(compiled(model(kind), rate=0.001), epochs=3) for kind in (tfloop.Model, keras.Model))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    np.testing.assert_allclose(np.add(ours["compiled_loss"], ours["other_losses"]), ours["loss"], rtol=1e-6)
