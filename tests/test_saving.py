"""Losses and metrics are part of a functional model that is saved, loaded or cloned, and of nobody's weights."""

import copy
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import tfloop

X = np.arange(10, dtype="float32")[:, None]
ZEROS = np.zeros((10, 1), "float32")


@keras.saving.register_keras_serializable("test_saving")
def growing(step):
    return ops.cast(step + 1, "float32")


@keras.saving.register_keras_serializable("test_saving")
class Adds(tfloop.Layer):
    def call(self, x):
        self.add_loss(ops.mean(x), name="in_layer", weight=0.5)
        self.add_metric(ops.mean(x**2), name="power")
        return x


def with_terms():
    """A functional model with symbolic terms of every kind, compiled."""
    inputs = keras.Input((1,), name="inputs")
    hidden = layers.Dense(2, activation="tanh", name="hidden")(Adds(name="adds")(inputs))
    model = tfloop.Model(inputs, layers.Dense(1, name="last")(hidden), name="with_terms")
    model.add_loss(ops.mean(hidden**2))
    model.add_loss(ops.mean(ops.abs(model.output)), name="size", weight=0.25)
    model.add_loss(ops.mean(ops.abs(hidden)), name="scheduled", weight=growing)
    model.add_loss(ops.mean(hidden), name="decaying", weight=keras.optimizers.schedules.ExponentialDecay(2.0, 10, 0.5))
    model.add_metric(hidden, name="total", aggregation="sum")
    model.add_metric(ops.max(hidden), name="largest", aggregation="max")
    model.add_metric(ops.mean(hidden), name="mean")
    model.compile(keras.optimizers.SGD(0.01), "mae", metrics=["mse"])
    return model


def evaluate(model, x=X, y=ZEROS):
    return model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)


def fit(model, x=X, y=ZEROS, **options):
    return model.fit(x, y, batch_size=4, shuffle=False, verbose=0, **options).history


def reloaded(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras")


def cloned(model, tmp_path):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    clone.compile(keras.optimizers.SGD(0.01), "mae", metrics=["mse"])
    return clone


def from_config(model, tmp_path):
    copied = type(model).from_config(model.get_config())
    copied.set_weights(model.get_weights())
    copied.compile(keras.optimizers.SGD(0.01), "mae", metrics=["mse"])
    return copied


every_copy = pytest.mark.parametrize("copied", [reloaded, cloned, from_config])
NAMES = ["loss", "compiled_loss", "in_layer", "size", "scheduled", "decaying", "other_losses"]
NAMES += ["mse", "total", "largest", "mean", "power"]


@every_copy
def test_a_functional_model_keeps_its_terms(copied, tmp_path):
    model = with_terms()
    before = evaluate(model)
    copy = copied(model, tmp_path)
    assert isinstance(copy, tfloop.Model) and copy.name == "with_terms"
    after = evaluate(copy)
    assert sorted(before) == sorted(NAMES)
    assert list(after) == list(before)
    assert after == pytest.approx(before, rel=1e-6)


@every_copy
def test_a_copy_trains_as_the_original_does(copied, tmp_path):
    model = with_terms()
    copy = copied(model, tmp_path)
    theirs, ours = fit(model), fit(copy)
    assert {n: v[0] for n, v in ours.items()} == pytest.approx({n: v[0] for n, v in theirs.items()}, rel=1e-6)


@every_copy
def test_a_copy_has_terms_of_its_own(copied, tmp_path):
    model = with_terms()
    copy = copied(model, tmp_path)
    copy.add_metric(ops.min(copy.output), name="new")
    assert "new" in evaluate(copy) and "new" not in evaluate(model)


def test_a_copy_of_a_copy_keeps_the_terms(tmp_path):
    model = with_terms()
    twice = reloaded(cloned(reloaded(model, tmp_path), tmp_path), tmp_path)
    assert evaluate(twice) == pytest.approx(evaluate(model), rel=1e-6)


def test_a_deep_copy_keeps_the_terms():
    model = with_terms()
    fit(model)
    again = copy.deepcopy(model)
    assert evaluate(again) == pytest.approx(evaluate(model), rel=1e-6)


@keras.saving.register_keras_serializable("test_saving")
class Subclassed(tfloop.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.adds = Adds()
        self.last = layers.Dense(1)
        self.add_metric(lambda t: ops.mean(t["last"]), name="of_constructor")

    def build(self, shape):
        self.last.build(shape)
        self.built = True

    def call(self, x):
        return self.last(self.adds(x))


@pytest.mark.parametrize("make", [with_terms, Subclassed])
def test_functions_are_in_a_deep_copy_and_a_file_says_that_it_lacks_them(make, tmp_path):
    model = make()
    model.compile(keras.optimizers.SGD(0.01), "mae")
    model.add_loss(lambda t: ops.mean(t["last"] ** 2), name="function", weight=0.1)
    model.add_metric(lambda t: ops.mean(t["x"]), name="mean_input")
    model.watch("last", "rms")
    fit(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not hold")
        again = copy.deepcopy(model)
    theirs = evaluate(model)
    assert {"function", "mean_input", "last/rms"} < set(theirs)
    assert evaluate(again) == pytest.approx(theirs, rel=1e-6)
    with pytest.warns(UserWarning, match="a file does not hold them: 'function'.*'mean_input'"):
        model.save(tmp_path / "model.keras")


def test_a_trained_model_goes_on_where_it_was_saved(tmp_path):
    model = with_terms()
    model.compile(keras.optimizers.Adam(0.01), "mae")
    fit(model, epochs=2)
    again = reloaded(model, tmp_path)
    theirs, ours = fit(model), fit(again)
    assert {n: v[0] for n, v in ours.items()} == pytest.approx({n: v[0] for n, v in theirs.items()}, rel=1e-5)


def test_how_a_model_was_compiled_is_saved(tmp_path):
    model = with_terms()
    model.compile(keras.optimizers.Adam(0.02), "mae", jit_compile="loop", steps_per_execution=3)
    config = reloaded(model, tmp_path).get_compile_config()
    assert (config["jit_compile"], config["steps_per_execution"]) == ("loop", 3)
    assert float(reloaded(model, tmp_path).optimizer.learning_rate) == pytest.approx(0.02)


def test_compile_forgets_an_earlier_loss_and_metrics():
    model = with_terms()
    model.compile(keras.optimizers.SGD(0.01))
    assert set(evaluate(model)) == set(NAMES) - {"compiled_loss", "mse"}


def test_a_model_inside_another_keeps_its_terms(tmp_path):
    inner = with_terms()
    inputs = keras.Input((1,))
    outer = tfloop.Model(inputs, layers.Dense(1)(inner(inputs)))
    outer.add_metric(ops.mean(outer.output), name="outer")
    outer.compile(keras.optimizers.SGD(0.01), "mae")
    before = evaluate(outer)
    assert {"outer", "largest", "size", "power"} <= set(before)
    assert evaluate(reloaded(outer, tmp_path)) == pytest.approx(before, rel=1e-6)


# What only a loss needs.


def with_side_input():
    """The target is an input, which the loss alone needs, and so is a layer."""
    x, target = keras.Input((1,), name="x"), keras.Input((1,), name="target")
    hidden = layers.Dense(2, name="hidden")(x)
    model = tfloop.Model([x, target], layers.Dense(1, name="last")(hidden))
    model.add_loss(ops.mean((layers.Dense(1, name="only_loss")(hidden) - target) ** 2), name="side")
    model.compile(keras.optimizers.SGD(0.001))
    return model


def test_inputs_and_layers_that_only_a_loss_needs_are_trained():
    model = with_side_input()
    layer = model.get_layer("only_loss")
    before = layer.kernel.numpy()
    assert any(layer.kernel is v for v in model.trainable_variables)
    history = fit(model, [X, 2 * X], None, epochs=3)
    assert history["loss"][-1] < history["loss"][0]
    assert np.any(layer.kernel.numpy() != before)


def test_inputs_and_layers_that_only_a_loss_needs_are_saved(tmp_path):
    model = with_side_input()
    fit(model, [X, 2 * X], None)
    again = reloaded(model, tmp_path)
    assert evaluate(again, [X, 2 * X], None) == pytest.approx(evaluate(model, [X, 2 * X], None), rel=1e-6)
    for one, other in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    again.load_weights(tmp_path / "model.keras")


def test_layers_that_only_a_loss_needs_are_named_as_others_are():
    model = with_side_input()
    model.add_metric(lambda t: ops.mean(t["only_loss"]), name="mean")
    model.watch("gradients/only_loss/kernel", "norm")
    assert list(fit(model, [X, 2 * X], None)) == ["loss", "mean", "gradients/only_loss/kernel/norm"]


@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True)])
def test_weights_files_do_not_depend_on_symbolic_terms(saved, loaded, tmp_path):
    def make(with_terms):
        inputs = keras.Input((1,))
        model = tfloop.Model(inputs, layers.Dense(1)(layers.Dense(2)(inputs)))
        if with_terms:
            model.add_loss(ops.mean(model.layers[1].output))
        return model

    one, other = make(saved), make(loaded)
    one.save_weights(tmp_path / "some.weights.h5")
    other.load_weights(tmp_path / "some.weights.h5")
    np.testing.assert_array_equal(one(X), other(X))


def test_weights_of_layers_that_only_a_loss_needs_are_in_weights_files(tmp_path):
    model, other = with_side_input(), with_side_input()
    fit(model, [X, 2 * X], None)
    model.save_weights(tmp_path / "some.weights.h5")
    other.load_weights(tmp_path / "some.weights.h5")
    assert evaluate(other, [X, 2 * X], None) == pytest.approx(evaluate(model, [X, 2 * X], None), rel=1e-6)


# Metrics are no weights.


class Plain(tfloop.Model):
    def __init__(self, metrics=False):
        super().__init__()
        self.with_metrics = metrics
        self.hidden = layers.Dense(2)
        self.last = layers.Dense(1)
        if metrics:
            self.attribute = keras.metrics.Mean(name="attribute")

    def call(self, x):
        hidden = self.hidden(x)
        if self.with_metrics:
            self.add_metric(ops.mean(hidden), name="named")
            self.add_metric(self.attribute(hidden))
        return self.last(hidden)


def test_metrics_are_in_no_list_of_weights():
    plain, measured = Plain(), Plain(metrics=True)
    measured.add_metric(lambda t: ops.mean(t["hidden"]), name="registered")
    for model in (plain, measured):
        model.compile("sgd", "mse")
        fit(model)
        model(X)
    for weights in ("weights", "trainable_weights", "non_trainable_weights", "variables"):
        assert len(getattr(measured, weights)) == len(getattr(plain, weights)), weights
    assert measured.count_params() == plain.count_params()
    assert len(measured.layers) == len(plain.layers)


@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True)])
def test_weights_files_do_not_depend_on_metrics(saved, loaded, tmp_path):
    one, other = Plain(metrics=saved), Plain(metrics=loaded)
    one.add_metric(lambda t: ops.mean(t["hidden"]), name="registered")
    for model in (one, other):
        model.compile("sgd", "mse")
        fit(model)
    one.save_weights(tmp_path / "some.weights.h5")
    other.load_weights(tmp_path / "some.weights.h5")
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Subclasses of a functional model.


@keras.saving.register_keras_serializable("test_saving")
class AE(tfloop.Model):
    """A model that makes its own graph, as the documentation of Keras allows."""

    def __init__(self, **kwargs):
        inputs = keras.Input((1,))
        code = layers.Dense(2, name="code")(inputs)
        super().__init__(inputs, layers.Dense(1, name="out")(code), **kwargs)
        self.add_loss(ops.mean(code**2), name="size")
        self.add_metric(ops.mean(code), name="mean")


@keras.saving.register_keras_serializable("test_saving")
class Halved(tfloop.Model):
    """A functional model with a step of its own."""

    def compute_loss(self, *args, **kwargs):
        return 0.5 * super().compute_loss(*args, **kwargs)


@keras.saving.register_keras_serializable("test_saving")
class AddsItself(tfloop.Model):
    """A functional model whose constructor adds terms."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_loss(ops.mean(self.output**2))
        self.add_metric(ops.mean(self.output), name="mean")


def test_a_subclass_that_makes_its_own_graph(tmp_path):
    model = AE()
    model.compile(keras.optimizers.SGD(0.01), "mae")
    history = fit(model)
    assert list(history) == ["loss", "compiled_loss", "size", "mean"]
    assert evaluate(reloaded(model, tmp_path)) == pytest.approx(evaluate(model), rel=1e-6)
    assert evaluate(from_config(model, tmp_path))["mean"] == pytest.approx(evaluate(model)["mean"], rel=1e-6)
    with pytest.raises(ValueError, match="from_config"):
        keras.models.clone_model(model)


def test_a_functional_subclass_with_a_step_of_its_own(tmp_path):
    def make(kind):
        inputs = keras.Input((1,))
        model = kind(inputs, layers.Dense(1, kernel_initializer="ones", name="last")(inputs))
        model.add_loss(ops.mean(model.output), name="size")
        model.compile(keras.optimizers.SGD(0.0), "mae")
        return model

    model = make(Halved)
    assert evaluate(model)["loss"] == pytest.approx(0.5 * evaluate(make(tfloop.Model))["loss"])
    again = reloaded(model, tmp_path)
    assert type(again) is Halved
    assert evaluate(again) == pytest.approx(evaluate(model), rel=1e-6)


@every_copy
def test_terms_that_a_constructor_adds_are_not_added_twice(copied, tmp_path):
    inputs = keras.Input((1,))
    model = AddsItself(inputs, layers.Dense(1, name="last")(inputs))
    model.add_loss(ops.mean(ops.abs(model.output)), name="later")
    model.compile(keras.optimizers.SGD(0.01), "mae", metrics=["mse"])
    again = copied(model, tmp_path)
    assert type(again) is AddsItself
    assert evaluate(again) == pytest.approx(evaluate(model), rel=1e-6)


def test_a_functional_subclass_makes_no_other_class_functional():
    class Later(tfloop.Model):
        def __init__(self, units):
            super().__init__()
            self.dense = layers.Dense(units)

        def call(self, x):
            return self.dense(x)

    class Base(tfloop.Model):
        pass

    class Functional(Base):
        def __init__(self):
            inputs = keras.Input((1,))
            super().__init__(inputs, inputs * 2)

    AE(), Functional()
    assert Functional()(X).shape == (10, 1)
    assert Later(3)(X).shape == (10, 3)
    assert isinstance(Functional(), keras.Function) and not isinstance(Later(3), keras.Function)
    assert not isinstance(tfloop.Model(), keras.Function)


def test_a_class_may_be_used_functionally_and_not():
    """As `keras.Model` itself: what is given to `__init__` decides."""
    functional = tfloop.Model(inputs := keras.Input((1,)), layers.Dense(1)(inputs))
    by_name = tfloop.Model(inputs=inputs, outputs=functional.output)
    with pytest.raises(ValueError, match="symbolic"):
        Plain().add_metric(functional.output, name="m")
    by_name.add_metric(by_name.output, name="m")


def test_functions_of_the_step_are_in_no_file_and_that_is_said(tmp_path):
    model = with_terms()
    model.add_metric(lambda t: ops.mean(t["hidden"]), name="function")
    with pytest.warns(UserWarning, match="'function'"):
        again = reloaded(model, tmp_path)
    assert set(evaluate(model)) - set(evaluate(again)) == {"function"}
