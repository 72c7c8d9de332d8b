"""Losses and metrics from outside: any tensor, every kind of value, patterns, and errors at the earliest moment."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfloop

X = np.random.default_rng(0).normal(size=(10, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(10, 2)).astype("float32")
MODES = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "step": {"jit_compile": "step"},
    "loop": {"jit_compile": "loop"},
    "one": {"steps_per_execution": 1},
    "three": {"steps_per_execution": 3},
}


class Net(tfloop.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(4, activation="relu")
        self.out = layers.Dense(2)

    def call(self, x):
        return self.out(tfloop.tag(self.hidden(x) * 2.0, "doubled"))


def net(loss="mse", **compiled):
    keras.utils.set_random_seed(0)
    model = Net()
    model.compile("sgd", loss, **compiled)
    return model


def fit(model, epochs=1, **kwargs):
    return model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **kwargs).history


@pytest.mark.parametrize("mode", MODES)
def test_a_metric_sees_every_kind_of_tensor(mode):
    model = net(**MODES[mode])
    names = ["x", "y", "y_pred", "hidden", "doubled", "weights/out/kernel", "gradients/out/kernel", "updates/out/bias"]
    for name in names:
        model.add_metric(lambda t, name=name: ops.mean(t[name] ** 2), name=name.replace("/", "_"))
    history = fit(model)
    assert list(history) == ["loss", *(n.replace("/", "_") for n in names)]
    np.testing.assert_allclose(history["x"], np.mean(X**2), rtol=1e-5)
    np.testing.assert_allclose(history["y"], np.mean(Y**2), rtol=1e-5)
    reference = net(run_eagerly=True)
    reference.add_metric(lambda t: ops.mean(t["gradients/out/kernel"] ** 2), name="gradients_out_kernel")
    np.testing.assert_allclose(history["gradients_out_kernel"], fit(reference)["gradients_out_kernel"], rtol=1e-5)


def test_gradients_and_updates_are_those_of_the_step():
    model = net(loss=None, run_eagerly=True)
    model.compile(keras.optimizers.SGD(0.5), run_eagerly=True)
    model.add_loss(lambda t: ops.mean(t["y_pred"]))
    model.add_metric(lambda t: ops.sum(t["gradients/out/bias"]), name="gradient")
    model.add_metric(lambda t: ops.sum(t["updates/out/bias"]), name="update")
    model.add_metric(lambda t: ops.sum(t["weights/out/bias"]), name="weight", aggregation="last")
    logs = model.train_on_batch(X, Y, return_dict=True)
    np.testing.assert_allclose(logs["gradient"], 1.0, rtol=1e-6)  # of the mean over (batch, 2) by two biases
    np.testing.assert_allclose(logs["update"], -0.5, rtol=1e-6)
    assert logs["weight"] == 0.0  # before the update


def test_a_frozen_weight_has_no_gradient():
    model = net()
    model.hidden.trainable = False
    model.compile("sgd", "mse")
    model.watch("gradients/*", "norm")
    assert [k for k in fit(model) if k.startswith("gradients")] == [
        "gradients/out/kernel/norm",
        "gradients/out/bias/norm",
    ]


def test_clipping_comes_after_the_gradient_that_is_shown():
    model = net()
    model.compile(keras.optimizers.SGD(1.0, global_clipnorm=1e-3), "mse")
    model.watch("gradients/*/kernel", "norm")
    model.watch("updates/*/kernel", "norm")
    history = fit(model)
    assert history["gradients/out/kernel/norm"][0] > 0.1
    assert history["updates/out/kernel/norm"][0] < 1.1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_may_be_a_schedule_of_completed_updates(mode):
    model = net(loss=None, **MODES[mode])
    seen = []
    model.add_loss(
        lambda t: ops.mean(t["y_pred"]) * 0.0 + 1.0, name="one", weight=lambda step: ops.cast(step, "float32")
    )
    model.add_loss(lambda t: ops.mean(t["y_pred"] ** 2), name="other")
    spy = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: seen.append(logs["one"]))
    history = fit(model, epochs=2, callbacks=[spy], validation_data=(X, Y))
    np.testing.assert_allclose(seen[0], 0.0)
    np.testing.assert_allclose(history["one"], [(0 * 4 + 1 * 4 + 2 * 2) / 10, (3 * 4 + 4 * 4 + 5 * 2) / 10], rtol=1e-6)
    np.testing.assert_allclose(history["val_one"], [3.0, 6.0])


class Ramp(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.5 * step + 0.25

    def get_config(self):
        return {}


@pytest.mark.parametrize("mode", MODES)
def test_a_schedule_that_multiplies_the_step_by_a_float_is_a_weight_as_it_is_a_learning_rate(mode):
    model = net(loss=None, **MODES[mode])
    model.add_loss(lambda t: ops.mean(t["y_pred"]) * 0.0 + 1.0, name="ramp", weight=Ramp())
    model.add_loss(lambda: 1.0, name="decay", weight=lambda step: 0.5**step)
    history = fit(model)
    np.testing.assert_allclose(history["ramp"], [(0.25 * 4 + 0.75 * 4 + 1.25 * 2) / 10], rtol=1e-6)
    np.testing.assert_allclose(history["decay"], [(1.0 * 4 + 0.5 * 4 + 0.25 * 2) / 10], rtol=1e-6)


class Weighted(tfloop.Layer):
    """Adds the loss 1, in `call` or as a function."""

    def __init__(self, weight, in_call):
        super().__init__()
        self._options = {"name": "one", "weight": weight}
        self._in_call = in_call
        if not in_call:
            self.add_loss(lambda: tf.constant(1.0), **self._options)

    def call(self, x):
        if self._in_call:
            self.add_loss(tf.constant(1.0), **self._options)
        return x


def with_weight(weight, where, **compiled):
    """A model with a loss that is 1, added in one of the ways there are."""
    inputs = keras.Input((3,))
    layer = Weighted(weight, where == "call") if where in ("call", "function") else layers.Identity()
    model = tfloop.Model(inputs, layers.Dense(2, name="out")(layer(inputs)))
    if where == "symbolic":
        model.add_loss(0.0 * ops.mean(model.output) + 1.0, name="one", weight=weight)
    elif where == "registry":
        model.add_loss(lambda t: 1.0 + 0.0 * ops.mean(t["out"]), name="one", weight=weight)
    model.compile(keras.optimizers.SGD(0.0), "mse", **compiled)
    return model


WHERE = ["registry", "symbolic", "call", "function"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "weight", [lambda step: step, lambda step: step / 1, lambda step: 1.0 * ops.cast(step, "float16"), tf.identity]
)
def test_a_schedule_may_give_a_number_of_any_type(where, weight):
    model = with_weight(weight, where, jit_compile=False)
    assert fit(model)["one"] == pytest.approx([(0 * 4 + 1 * 4 + 2 * 2) / 10])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", [tf.Variable, keras.Variable])
@pytest.mark.parametrize("mode", ["eager", "graph", "loop"])
def test_a_weight_may_be_a_variable_that_is_read_in_every_step(where, kind, mode):
    weight = kind(0.0)
    model = with_weight(weight, where, **MODES[mode])
    callback = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: weight.assign(epoch))
    assert fit(model, epochs=3, callbacks=[callback])["one"] == [0.0, 1.0, 2.0]


def test_a_file_holds_the_value_of_a_weight_that_is_a_variable(tmp_path):
    weight = tf.Variable(0.0)
    model = with_weight(weight, "symbolic")
    weight.assign(3.0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(X, Y, verbose=0, return_dict=True)["one"] == 3.0


@pytest.mark.parametrize("mode", MODES)
def test_aggregations_are_really_done(mode):
    model = net(**MODES[mode])
    for aggregation in ("mean", "sum", "min", "max", "last"):
        model.add_metric(lambda t: t["x"][:, 0], name=aggregation, aggregation=aggregation)
    history = fit(model)
    first = X[:, 0]
    expected = {
        "mean": first.mean(),
        "sum": first.sum(),
        "min": first.min(),
        "max": first.max(),
        "last": first[8:].mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(history[name], value, rtol=1e-5, err_msg=name)


def test_decorators_name_the_metric_and_return_the_function():
    model = net()

    @model.add_metric
    def hidden_size(t):
        return ops.mean(ops.abs(t["hidden"]))

    @model.add_metric(name="largest", aggregation="max")
    def some_function(t):
        return ops.max(t["hidden"])

    @model.add_loss(name="small", weight=0.5)
    def small(t):
        return ops.mean(t["hidden"] ** 2)

    assert callable(hidden_size) and callable(some_function) and callable(small)
    assert list(fit(model)) == ["loss", "compiled_loss", "small", "hidden_size", "largest"]


def test_a_loss_may_take_no_argument():
    model = net()
    model(X)
    model.add_loss(lambda: ops.mean(model.out.kernel**2), name="decay")
    history = fit(model)
    np.testing.assert_allclose(history["loss"], np.add(history["compiled_loss"], history["decay"]), rtol=1e-6)


def test_adding_after_compile_and_after_a_fit_takes_effect_at_the_next_fit():
    model = net()
    model.add_metric(lambda t: ops.mean(t["hidden"]), name="first")
    assert list(fit(model)) == ["loss", "first"]
    model.add_metric(lambda t: ops.mean(t["out"]), name="second")
    model.add_loss(lambda t: ops.mean(t["hidden"] ** 2), name="third")
    model.watch("hidden", "max")
    assert list(fit(model)) == ["loss", "compiled_loss", "third", "first", "second", "hidden/max"]


def test_a_loss_changes_the_weights_and_a_metric_does_not():
    plain, with_metric, with_loss = net(), net(), net()
    with_metric.add_metric(lambda t: ops.mean(t["hidden"] ** 2), name="m")
    with_loss.add_loss(lambda t: ops.mean(t["hidden"] ** 2), name="m")
    for model in (plain, with_metric, with_loss):
        fit(model)
    np.testing.assert_array_equal(plain.out.kernel, with_metric.out.kernel)
    assert np.abs(plain.hidden.kernel - with_loss.hidden.kernel).max() > 1e-4


def test_a_vector_loss_is_averaged_in_value_and_gradient():
    gradients = []
    for reduce in (lambda v: v, ops.mean):
        model = net(loss=None)
        model.add_loss(lambda t, reduce=reduce: reduce(ops.sum(t["y_pred"] ** 2, axis=1)))
        model.watch("gradients/out/kernel", "norm")
        gradients.append(fit(model))
    for name, values in gradients[0].items():
        np.testing.assert_allclose(values, gradients[1][name], rtol=1e-6)


# Watching.


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", ["hidden/rms", "doubled/rms", "out/rms"]),
        ("h*", ["hidden/rms"]),
        ("*d*", ["hidden/rms", "doubled/rms"]),
        ("gradients/*/kernel", ["gradients/hidden/kernel/rms", "gradients/out/kernel/rms"]),
        ("losses/*", ["losses/compiled_loss/rms"]),
        ("x", ["x/rms"]),
        ("weights/out/*", ["weights/out/kernel/rms", "weights/out/bias/rms"]),
    ],
)
def test_patterns(pattern, found):
    model = net()
    model.watch(pattern)
    assert list(fit(model)) == ["loss", *found]


@pytest.mark.parametrize("mode", MODES)
def test_every_n_steps(mode):
    model = net(**MODES[mode])
    model.add_metric(lambda t: t["x"][:, 0], name="every_step", aggregation="mean")
    model.watch("x", "mean", every=2)
    history = fit(model, epochs=2)
    means = [X[:4].mean(), X[4:8].mean(), X[8:].mean()]
    sizes = [4, 4, 2]
    first = (means[0] * sizes[0] + means[2] * sizes[2]) / 6  # steps 0 and 2
    np.testing.assert_allclose(history["x/mean"], [first, means[1]], rtol=1e-5)  # and step 4


@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_measures_every_step(mode):
    model = net(**MODES[mode])
    model.watch("x", "mean", every=3)
    model.watch("x", "max", every=7)
    history = fit(model, epochs=2, validation_data=(X, Y), validation_batch_size=4)
    np.testing.assert_allclose(history["val_x/mean"], [X.mean()] * 2, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(history["val_x/max"], [X.max()] * 2, rtol=1e-6)
    assert model.test_on_batch(X, Y, return_dict=True)["x/max"] == X.max()


def test_layers_called_as_the_batch_is_do_not_hide_it():
    class Named(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.x = layers.Dense(3)
            self.y = layers.Dense(2, activation="relu")

        def call(self, inputs):
            return self.y(self.x(inputs)) + self.y(inputs)

    model = Named()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    for name in ("x", "y"):
        model.add_metric(lambda t, name=name: ops.mean(t[name]), name=name)
    model.add_metric(lambda t: ops.mean((t["y"] - t["y_pred"]) ** 2), name="mse")
    model.watch("*", "mean")
    model.watch("weights/y/*", "mean")
    history = fit(model)
    assert list(history)[4:] == ["x:1/mean", "y:1/mean", "y:2/mean", "weights/y/kernel/mean", "weights/y/bias/mean"]
    assert history["x"] == pytest.approx([X.mean()], rel=1e-5) and history["y"] == pytest.approx([Y.mean()], rel=1e-5)
    assert history["mse"] == pytest.approx(history["loss"], rel=1e-5)
    np.testing.assert_allclose(history["x:1/mean"], np.mean(X @ model.x.kernel), rtol=1e-4)
    np.testing.assert_allclose(history["y:2/mean"], np.mean(np.maximum(X @ model.y.kernel, 0)), rtol=1e-4)


def test_min_and_max_over_the_epoch():
    model = net()
    model.watch("x", "min")
    model.watch("x", "max")
    history = fit(model)
    np.testing.assert_allclose([history["x/min"][0], history["x/max"][0]], [X.min(), X.max()], rtol=1e-6)


def test_a_histogram_is_no_scalar_of_the_log():
    model = net()
    model.watch("hidden", "histogram")
    assert list(fit(model)) == ["loss"]


def test_gradients_are_left_out_of_evaluation():
    model = net()
    model.watch("gradients/*", "norm")
    model.add_metric(lambda t: ops.norm(t["gradients/out/kernel"]), name="g")
    model.add_metric(lambda t: tf.linalg.global_norm(list(t.select("gradients/*").values())), name="all")
    history = fit(model, validation_data=(X, Y))
    assert [k for k in history if k.startswith("val_")] == ["val_loss"]


def test_gradients_that_are_selected_are_those_of_an_update():
    small, large = net(accumulate=2), net()
    for model in (small, large):
        model.add_metric(lambda t: tf.linalg.global_norm(list(t.select("gradients/*").values())), name="norm")
    small.fit(X[:8], Y[:8], batch_size=4, shuffle=False, verbose=0)
    large.fit(X[:8], Y[:8], batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(small.history.history["norm"], large.history.history["norm"], rtol=1e-5)


def test_a_loss_that_selects_gradients_is_told_that_there_are_none():
    model = net()
    model.add_loss(lambda t: tf.linalg.global_norm(list(t.select("gradients/*").values())), name="penalty")
    with pytest.raises(KeyError, match="a loss cannot"):
        fit(model)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("make", [tf.RaggedTensor.from_tensor, tf.sparse.from_dense])
def test_tensors_that_are_not_dense_are_watched(mode, make):
    class Makes(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.make = layers.Lambda(make)
            self.out = layers.Dense(2)

        def call(self, x):
            tfloop.tag(self.make(x), "tagged")
            return self.out(x)

    model = Makes()
    model.compile("sgd", "mse", **MODES[mode])
    model.watch("*", "mean")
    history = fit(model)
    assert list(history) == ["loss", "make/mean", "tagged/mean", "out/mean"]
    np.testing.assert_allclose([history["make/mean"], history["tagged/mean"]], X.mean(), rtol=1e-5)


def test_what_an_inner_model_watches_is_shown_under_full_names():
    inner = tfloop.Model(x := keras.Input((3,)), layers.Dense(2, name="hidden")(x), name="inner")
    model = tfloop.Model(x := keras.Input((3,)), layers.Dense(2, name="out")(inner(x)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    inner.watch("*", "mean")
    inner.watch("gradients/*/kernel", "norm", every=2)
    model.watch("inner/hidden", "mean")
    history = fit(model, validation_data=(X, Y))
    watched = ["inner/hidden/mean", "gradients/inner/hidden/kernel/norm"]
    assert list(history) == ["loss", *watched, "val_loss", "val_inner/hidden/mean"]
    np.testing.assert_allclose(history["val_inner/hidden/mean"], np.mean(inner(X)), rtol=1e-4, atol=1e-6)
    inner.watch("absent")
    with pytest.raises(ValueError, match=r"'absent'.*matches no tensor.*'hidden'"):
        fit(model)


# Errors.

ERRORS = {
    "a lambda without a name": (lambda m: m.add_metric(lambda t: 0.0), ValueError, "needs a name"),
    "a metric's name twice": (
        lambda m: [m.add_metric(lambda t: 0.0, name="a") for _ in range(2)],
        ValueError,
        "different names",
    ),
    "a loss's name twice": (lambda m: [m.add_loss(lambda t: 0.0, name="a") for _ in range(2)], ValueError, "already"),
    "an eager tensor": (lambda m: m.add_metric(tf.ones(2), name="a"), ValueError, "symbolic tensor or a callable"),
    "an eager loss": (lambda m: m.add_loss(tf.ones(2)), ValueError, "lambda"),
    "an unknown aggregation": (lambda m: m.add_metric(lambda t: 0.0, "a", "median"), ValueError, "'median'"),
    "a function of two": (lambda m: m.add_loss(lambda a, b: 0.0), TypeError, "2 arguments"),
    "a weight that is no number": (lambda m: m.add_loss(lambda t: 0.0, weight="x"), TypeError, "weight='x'"),
    "a weight that is a vector": (
        lambda m: m.add_loss(lambda t: 0.0, weight=tf.Variable([1.0, 2.0])),
        TypeError,
        "scalar",
    ),
    "a weight that is not finite": (lambda m: m.add_loss(lambda t: 0.0, weight=np.nan), ValueError, "finite"),
    "a metric object": (lambda m: m.add_metric(keras.metrics.Mean(name="m"), name="m"), TypeError, "calling it"),
    "an unknown statistic": (lambda m: m.watch("*", "median"), ValueError, "There is 'mean'"),
    "every 0": (lambda m: m.watch("*", every=0), ValueError, "every=0"),
    "a symbolic tensor on a subclassed model": (
        lambda m: m.add_loss(ops.mean(keras.Input((3,)))),
        ValueError,
        "functional",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_said_at_once(case):
    add, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        add(net())


def test_a_loss_name_is_taken_once_whatever_the_losses_are():
    model = tfloop.Model(x := keras.Input((3,)), y := layers.Dense(2, name="out")(x))
    model.add_loss([ops.mean(y), ops.mean(y**2)], name="both")  # one loss, of two parts
    model.add_loss(lambda t: ops.mean(t["out"]), name="function")
    for name in ("both", "function"):
        for value in (ops.mean(y), lambda t: 0.0):
            with pytest.raises(ValueError, match=f"{name}.*already has a loss"):
                model.add_loss(value, name=name)
    model.compile(keras.optimizers.SGD(0.0))
    history = fit(model)
    values = model(X).numpy()
    assert history["both"] == pytest.approx([values.mean() + np.mean(values**2)], rel=1e-4)
    assert list(history) == ["loss", "both", "function"]


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("where", ["call", "function"])
def test_a_schedule_in_a_layer_needs_somebody_who_counts_updates(where, run_eagerly):
    layer = Weighted(lambda step: ops.cast(step, "float32"), where == "call")
    model = keras.Sequential([keras.Input((3,)), layer, layers.Dense(2)])
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    if where == "call" or not run_eagerly:
        with pytest.raises(ValueError, match="a plain keras"):
            model.fit(X, Y, verbose=0)
    ours = tfloop.Model(model.inputs, model.outputs)
    ours.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=run_eagerly)
    assert fit(ours)["one"] == pytest.approx([(0 * 4 + 1 * 4 + 2 * 2) / 10])
    if where == "call":
        ours(X, training=True)
        assert [float(loss) for loss in ours.losses] == [3.0]  # in a plain call, the model's count


def test_a_statistic_that_is_no_scalar_is_named_with_its_tensor():
    @tfloop.register_statistic(name="means_of_columns")
    def means_of_columns(tensor):
        return tf.reduce_mean(tensor, 0)

    model = net()
    model.watch("hidden", "means_of_columns")
    with pytest.raises(ValueError, match=r"'means_of_columns' of 'hidden' gave a tensor of shape \(4,\)"):
        fit(model)


TRACED = {
    "a wrong name": (lambda m: m.add_metric(lambda t: t["hiden"], name="a"), KeyError, "Did you mean 'hidden'"),
    "a gradient in a loss": (lambda m: m.add_loss(lambda t: t["gradients/out/kernel"]), KeyError, "a metric can"),
    "no match": (lambda m: m.watch("encoder/*"), ValueError, "matches no tensor.*'hidden'"),
    "a string as a metric": (lambda m: m.add_metric(lambda t: tf.constant("a"), name="a"), TypeError, "numbers"),
    "None as a loss": (lambda m: m.add_loss(lambda t: None), TypeError, "None"),
}


@pytest.mark.parametrize("case", TRACED)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_what_only_the_step_knows_is_said_before_training(case, mode):
    model = net(**MODES[mode])
    model(X)
    before = model.out.kernel.numpy()
    add, error, message = TRACED[case]
    add(model)
    with pytest.raises(error, match=message):
        fit(model)
    np.testing.assert_array_equal(before, model.out.kernel)


class Mapped(tfloop.Model):
    """Goes through its examples one by one, in a `vectorized_map`, and does `then` with the model and one's output."""

    def __init__(self, then):
        super().__init__()
        self.hidden = layers.Dense(2)
        self._then = then

    def build(self, shape):
        self.hidden.build((None, 3))
        self.built = True

    def call(self, x):
        def of_one_example(row):
            hidden = self.hidden(row[None])[0]
            self._then(self, hidden)
            return hidden

        return ops.vectorized_map(of_one_example, x)


def mapped(mode, then=lambda model, hidden: tfloop.tag(hidden, "tagged")):
    model = Mapped(then)
    model.compile(keras.optimizers.SGD(0.0), "mse", **MODES[mode])
    return model


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", ["hidden", "tagged"])
def test_what_is_made_in_a_vectorized_map_cannot_be_had(mode, name):
    model = mapped(mode)
    history = fit(model)
    assert history["loss"] == pytest.approx([np.mean((X @ model.hidden.kernel + model.hidden.bias - Y) ** 2)], rel=1e-5)
    model.add_metric(lambda t: ops.mean(t[name]), name="m")
    with pytest.raises(KeyError, match=f"{name}.*vectorized_map"):
        fit(model)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("add", ["add_loss", "add_metric"])
def test_nothing_can_be_added_in_a_vectorized_map(mode, add):
    model = mapped(mode, lambda model, hidden: getattr(model, add)(ops.mean(hidden), name="of_one"))
    with pytest.raises(ValueError, match=rf"{add}\(name='of_one'\).*one example"):
        fit(model)
