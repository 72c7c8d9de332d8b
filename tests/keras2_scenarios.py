"""Programs written for Keras 2's `add_metric` and `add_loss`, each told once for both Keras.

A scenario takes a namespace `k`, either Keras 2's (tf_keras) or Keras 3's with tfloop's Layer and Model, and returns
what it saw as plain data. As a script this file runs them all under tf_keras and prints their results as JSON, so that
the two Keras never meet in one process.
"""

import json
import types

import numpy as np
import tensorflow as tf

SCENARIOS = {}
X = np.arange(10, dtype="float32")[:, None]
ZEROS = np.zeros((10, 1), "float32")


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def keras2():
    import tf_keras as keras

    return types.SimpleNamespace(
        **{n: getattr(keras, n) for n in ("Input", "Model", "callbacks", "layers", "metrics", "optimizers")},
        Layer=keras.layers.Layer,
        mean=tf.reduce_mean,
        sum=tf.reduce_sum,
        square=tf.square,
        abs=tf.abs,
    )


def keras3():
    import keras

    import tfloop

    return types.SimpleNamespace(
        **{n: getattr(keras, n) for n in ("Input", "callbacks", "layers", "metrics", "optimizers")},
        **{n: getattr(keras.ops, n) for n in ("mean", "sum", "square", "abs")},
        Layer=tfloop.Layer,
        Model=tfloop.Model,
    )


def adding(k, call, **attributes):
    """A layer that runs `call(layer, x)` and returns its input."""

    class Adding(k.Layer):
        def __init__(self):
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value)

        def call(self, x, training=None):
            call(self, x)
            return x

    return Adding()


def subclassed(k, call, **attributes):
    """A model that runs `call(model, x, training)` and predicts its input."""

    class Subclassed(k.Model):
        def __init__(self):
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value)
            self.out = identity(k)

        def call(self, x, training=None):
            call(self, x, training)
            return self.out(x)

    return Subclassed()


def losing(k, loss, **options):
    """A model that adds `loss(prediction)`."""
    return subclassed(k, lambda self, x, training: self.add_loss(loss(self.out(x)), **options))


def identity(k):
    return k.layers.Dense(1, kernel_initializer="ones", use_bias=False)


def functional(k, *layers):
    """A functional model of these layers, with a trainable layer at the end that changes nothing."""
    inputs = outputs = k.Input((1,))
    for layer in layers:
        outputs = layer(outputs)
    return k.Model(inputs, identity(k)(outputs))


def fit(k, model, y=ZEROS, x=X, batch_size=5, epochs=2, loss="mae", rate=0.0, **options):
    """The history of a training that, unless a rate is given, leaves the weights alone."""
    names = ("metrics", "run_eagerly", "steps_per_execution", "jit_compile", "loss_weights", "weighted_metrics")
    compiled = {name: options.pop(name) for name in names if name in options}
    model.compile(k.optimizers.SGD(rate), loss if y is not None else None, **compiled)
    return model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, **options).history


def error(function, *args, **kwargs):
    """The kind of error that this raises."""
    try:
        function(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError) as raised:
        return type(raised).__name__
    return "no error"


# Signature and arguments.


@scenario
def the_name_is_the_second_argument(k):
    return fit(k, functional(k, adding(k, lambda self, x: self.add_metric(k.sum(x), "total"))))


@scenario
def an_unknown_keyword_is_a_type_error(k):
    layer = adding(k, lambda self, x: self.add_metric(k.sum(x), name="total", how="mean"))
    return error(fit, k, subclassed(k, lambda self, x, training: layer(x)))


@scenario
def three_positional_arguments_in_the_old_order_are_an_error(k):
    layer = adding(k, lambda self, x: self.add_metric(k.sum(x), "mean", "total"))
    return error(lambda: layer(X)) != "no error"


@scenario
def no_aggregation_none_and_mean_are_the_same(k):
    def call(self, x):
        self.add_metric(k.mean(x), name="absent")
        self.add_metric(k.mean(x), name="none", aggregation=None)
        self.add_metric(k.mean(x), name="mean", aggregation="mean")

    return fit(k, functional(k, adding(k, call)))


@scenario
def a_metric_needs_a_name(k):
    return error(fit, k, subclassed(k, lambda self, x, training: self.add_metric(k.sum(x))))


@scenario
def a_metric_result_needs_no_name(k):
    def call(self, x):
        self.add_metric(self.mean(x))
        self.add_metric(self.total(x), aggregation=None)

    layer = adding(k, call, mean=k.metrics.Mean(name="its_own"), total=k.metrics.Sum(name="total"))
    return fit(k, functional(k, layer), batch_size=4)


@scenario
def a_metric_object_s_name_wins_over_the_given_one(k):
    layer = adding(k, lambda self, x: self.add_metric(self.mean(x), name="given"), mean=k.metrics.Mean(name="its_own"))
    return fit(k, functional(k, layer), batch_size=4)


@scenario
def a_metric_object_instead_of_its_result_is_an_error(k):
    layer = adding(k, lambda self, x: self.add_metric(self.mean, name="mean"), mean=k.metrics.Mean(name="its_own"))
    return error(lambda: layer(X)) != "no error"


@scenario
def plain_numbers_are_values(k):
    def call(self, x):
        self.add_metric(3, name="int")
        self.add_metric(0.5, name="float")
        self.add_metric(np.float32(0.25), name="numpy")

    return fit(k, functional(k, adding(k, call)))


@scenario
def a_tensor_of_any_shape_is_averaged_over_its_elements(k):
    def call(self, x):
        self.add_metric(x[:, 0], name="vector")
        self.add_metric(x, name="matrix")
        self.add_metric(k.square(x)[:, None, :] * [[[1.0, 3.0]]], name="cube")

    return fit(k, functional(k, adding(k, call)), batch_size=4)


@scenario
def nan_is_shown(k):
    return fit(k, functional(k, adding(k, lambda self, x: self.add_metric(k.mean(x) * float("nan"), name="bad"))))


# Which metric object is used.


@scenario
def one_name_twice_in_a_call_is_one_metric(k):
    def call(self, x):
        self.add_metric(k.mean(x), name="m")
        self.add_metric(3 * k.mean(x), name="m")

    model = functional(k, adding(k, call))
    return [fit(k, model), [m.name for m in model.layers[1].metrics]]


@scenario
def metric_attributes_are_tracked_at_assignment_in_lists_and_dicts_too(k):
    names = [k.metrics.Mean(name=f"m_{i}") for i in range(4)]

    class Tracks(k.Layer):
        def __init__(self):
            super().__init__()
            self.a = names[0]
            self.listed = [names[1]]
            self.named = {"b": names[2]}
            self.c = names[3]

    return [m.name for m in Tracks().metrics]


@scenario
def metric_attributes_are_no_layers(k):
    model = subclassed(k, lambda self, x, training: None, mean=k.metrics.Mean(name="a"), all=[k.metrics.Mean(name="b")])
    model(X)
    return [len(model.layers), [m.name for m in model.metrics]]


@scenario
def a_metric_attribute_of_the_same_name_is_updated(k):
    layer = adding(k, lambda self, x: self.add_metric(k.sum(x), name="m"), mean=k.metrics.Mean(name="m"))
    return fit(k, functional(k, layer))


@scenario
def two_metric_attributes_of_one_name_are_an_error(k):
    def call(self, x):
        self.add_metric(k.sum(x), name="metric_1")

    layer = adding(k, call, one=k.metrics.Mean(name="metric_1"), two=k.metrics.Mean(name="metric_1"))
    return error(fit, k, subclassed(k, lambda self, x, training: layer(x), layer=layer))


@scenario
def a_metric_result_is_counted_once(k):
    layer = adding(k, lambda self, x: self.add_metric(self.mean(x)), mean=k.metrics.Mean(name="m"))
    layer(X)
    layer(X)
    return [float(layer.mean.count), float(layer.mean.result())]


# Where it may be called.


@scenario
def in_a_model_and_in_nested_layers(k):
    def metric(name, factor):
        return lambda self, x, training=None: self.add_metric(factor * k.mean(x), name=name)

    inner = adding(k, metric("inner", 1))

    def outer(self, x):
        self.add_metric(2 * k.mean(x), name="outer")
        self.held[0](x)
        self.named["a"](x)

    outer = adding(k, outer, held=[inner], named={"a": adding(k, metric("named", 3))})
    outer.trainable = False

    def call(self, x, training):
        self.outer(x)
        self.add_metric(4 * k.mean(x), name="own")

    return fit(k, subclassed(k, call, outer=outer), validation_data=(X[:3], ZEROS[:3]))


@scenario
def a_shared_layer_averages_over_its_calls(k):
    layer = adding(k, lambda self, x: self.add_metric(k.mean(x), name="m"))

    def call(self, x, training):
        self.layer(x)
        self.layer(2 * x)

    return fit(k, subclassed(k, call, layer=layer))


@scenario
def a_shared_layer_in_a_functional_model_averages_over_its_calls(k):
    layer = adding(k, lambda self, x: self.add_metric(k.mean(x), name="m"))
    inputs = k.Input((1,))
    return fit(k, k.Model(inputs, identity(k)(layer(layer(inputs) + layer(inputs)))))


@scenario
def two_passes_in_a_train_step_average(k):
    class Twice(type(subclassed(k, None))):
        def train_step(self, data):
            x, _ = data
            self(x, training=True)
            self(3 * x, training=True)
            return {m.name: m.result() for m in self.metrics}

    class Metric(Twice):
        def __init__(self):
            k.Model.__init__(self)
            self.mean = k.metrics.Mean(name="attribute")
            self.out = identity(k)

        def call(self, x, training=None):
            self.add_metric(self.mean(x))
            return self.out(x)

    return fit(k, Metric(), loss=None)["attribute"]


@scenario
def on_a_functional_model_with_a_symbolic_tensor(k):
    inputs = k.Input((1,))
    hidden = identity(k)(inputs)
    model = k.Model(inputs, identity(k)(hidden))
    model.add_metric(k.mean(hidden), name="mean", aggregation="mean")
    model.add_metric(k.square(hidden), name="square")
    return fit(k, model, validation_data=(X[:4], ZEROS[:4]))


@scenario
def a_model_inside_carries_its_symbolic_terms(k):
    inputs = k.Input((1,))
    inner = k.Model(inputs, identity(k)(inputs))
    inner.add_metric(k.mean(inputs), name="m")
    inner.add_loss(k.mean(k.square(inputs)))
    return fit(k, functional(k, inner))


@scenario
def inputs_that_only_an_added_tensor_needs(k):
    x, side = k.Input((1,)), k.Input((1,))
    model = k.Model([x, side], identity(k)(x))
    model.add_loss(k.mean(k.abs(side - x)))
    model.add_metric(k.mean(side), name="side")
    return fit(k, model, x=[X, X + 2])


@scenario
def tensors_outside_call_are_an_error(k):
    model = subclassed(k, lambda self, x, training: None)
    model(X)
    return [
        error(model.add_metric, tf.constant(1.0), name="m"),
        error(model.add_metric, tf.Variable(1.0), name="m"),
        error(model.add_loss, tf.constant(1.0)) != "no error",
        error(model.add_loss, tf.Variable(1.0)) != "no error",
    ]


@scenario
def tensors_outside_call_are_an_error_on_a_functional_model(k):
    model = functional(k)
    return [
        error(model.add_metric, tf.constant(1.0), name="m"),
        error(model.add_metric, tf.Variable(1.0), name="m"),
        error(model.add_metric, k.metrics.Mean(name="m")(X)),
        error(model.add_loss, tf.constant(1.0)) != "no error",
    ]


@scenario
def a_symbolic_tensor_of_another_graph_is_an_error(k):
    other = k.mean(identity(k)(k.Input((1,))))
    return [error(functional(k).add_metric, other, name="m"), error(functional(k).add_loss, other)]


@scenario
def the_compiled_metrics_of_an_inner_model_are_not_shown(k):
    inner = functional(k, adding(k, lambda self, x: self.add_metric(k.mean(x), name="added")))
    inner.compile("sgd", "mse", metrics=["mse"])
    return fit(k, functional(k, inner), metrics=["mae"])


@scenario
def in_an_if_training(k):
    def call(self, x, training):
        if training:
            self.add_metric(k.sum(x), name="sum")
        self.add_metric(k.sum(x) if training else 0.0, name="else_0")

    history = fit(k, subclassed(k, call), validation_data=(X, ZEROS))
    return {name: value for name, value in history.items() if name != "val_sum"}


@scenario
def in_an_unrolled_rnn_cell(k):
    class Cell(k.Layer):
        state_size = output_size = 1

        def call(self, x, states):
            self.add_metric(k.mean(x), name="m")
            return x, [states[0] + x]

    inputs = k.Input((3, 1))
    model = k.Model(inputs, identity(k)(k.layers.RNN(Cell(), unroll=True)(inputs)))
    return fit(k, model, x=np.stack([X, X + 1, X + 2], 1))


@scenario
def in_a_cond(k):
    class Cond(type(subclassed(k, None))):
        def __init__(self):
            k.Model.__init__(self)
            self.out = identity(k)

        def add(self, x):
            self.add_metric(tf.reduce_mean(x), name="m")
            return x

        def call(self, x, training=None):
            return self.out(tf.cond(tf.reduce_mean(x) > -1, lambda: self.add(x), lambda: self.add(-x)))

    return fit(k, Cond())["m"]


@scenario
def after_compile_and_with_a_loss(k):
    inputs = k.Input((1,))
    model = k.Model(inputs, identity(k)(inputs))
    model.compile(k.optimizers.SGD(0.0), "mae")
    model.add_metric(k.mean(inputs), name="m")
    return model.fit(X, ZEROS, batch_size=5, shuffle=False, verbose=0).history


@scenario
def plain_calls_accumulate(k):
    layer = adding(k, lambda self, x: self.add_metric(k.sum(x), name="m"))
    layer(X)
    layer(2 * X)
    seen = [float(layer.metrics[0].result())]
    layer.metrics[0].reset_state()
    layer(3 * X)
    return [*seen, float(layer.metrics[0].result()), layer.metrics[0].name, len(layer.weights)]


@scenario
def plain_calls_accumulate_in_a_function(k):
    layer = adding(k, lambda self, x: self.add_metric(k.sum(x), name="m"))

    @tf.function
    def run(x):
        layer(x)
        layer(2 * x)

    run(tf.constant(X))
    run(tf.constant(X))
    seen = [float(layer.metrics[0].result())]
    layer.metrics[0].reset_state()
    run(tf.constant(2 * X))
    return [*seen, float(layer.metrics[0].result())]


# Weighting and reset.


@scenario
def values_for_each_example_give_the_mean_over_examples(k):
    return fit(k, functional(k, adding(k, lambda self, x: self.add_metric(x, name="m"))), batch_size=4)


@scenario
def metrics_are_reset_for_every_epoch_and_every_evaluation(k):
    layer = adding(k, lambda self, x: self.add_metric(k.mean(x), name="m"))
    model = functional(k, layer)
    history = fit(k, model, x=X[::-1] * 1, validation_data=(X[:5], ZEROS[:5]))
    return [history, model.evaluate(X, ZEROS, batch_size=5, verbose=0), model.evaluate(X[:2], ZEROS[:2], verbose=0)]


@scenario
def single_batches_show_their_own_values(k):
    model = functional(k, adding(k, lambda self, x: self.add_metric(k.mean(x), name="m")))
    model.compile(k.optimizers.SGD(0.0), "mae")
    seen = [model.train_on_batch(X[i : i + 5], ZEROS[:5]) for i in (0, 5)]
    return [*seen, *(model.test_on_batch(X[i : i + 5], ZEROS[:5]) for i in (0, 5))]


@scenario
def sample_weights_do_not_touch_an_added_metric(k):
    model = functional(k, adding(k, lambda self, x: self.add_metric(k.mean(x), name="m")))
    return fit(k, model, sample_weight=X[:, 0])


@scenario
def class_weights_do_not_touch_an_added_metric(k):
    model = functional(k, adding(k, lambda self, x: self.add_metric(k.mean(x), name="m")))
    return fit(k, model, y=(X > 4).astype("float32"), class_weight={0: 1.0, 1: 3.0})


@scenario
def a_metric_changes_no_gradient(k):
    def weights(factor):
        def call(self, x, training):
            if factor:
                self.add_metric(factor * k.mean(self.out(x)), name="m")

        model = subclassed(k, call)
        fit(k, model, rate=0.01)
        return float(np.ravel(model.get_weights()[0])[0])

    return [weights(0), weights(1), weights(1000)]


class _Bias:
    """Adds a trainable bias to its input: with SGD at 0.1 and targets x + 1, mae falls by 0.1 an epoch."""

    def __new__(cls, k, call=None, **attributes):
        class Bias(k.Layer):
            def __init__(self):
                super().__init__()
                for name, value in attributes.items():
                    setattr(self, name, value)

            def build(self, shape):
                self.bias = self.add_weight(shape=(1,), initializer="zeros", name="bias")

            def call(self, x):
                return call(self, *x) if call else x + self.bias

        return Bias()


@scenario
def one_value_as_object_in_a_layer_as_symbolic_tensor_as_compiled_metric_and_as_loss(k):
    def call(self, x, y):
        output = x + self.bias
        self.add_metric(self.mae(y, output))
        return output

    x, y = k.Input((1,)), k.Input((1,))
    outputs = _Bias(k, call, mae=k.metrics.MeanAbsoluteError(name="mae_1"))([x, y])
    model = k.Model([x, y], outputs)
    model.add_metric(k.mean(k.abs(y - outputs)), name="mae_2", aggregation="mean")
    mae = k.metrics.MeanAbsoluteError(name="mae_3")
    return sorted(fit(k, model, x=[X, X + 1], y=X + 1, epochs=5, rate=0.1, metrics=[mae]).items())


@scenario
def a_metric_whose_result_is_a_dict_shows_its_keys(k):
    class Both(k.metrics.Metric):
        def __init__(self, name):
            super().__init__(name=name)
            self.last = self.add_weight(shape=(), initializer="zeros", name="last")

        def update_state(self, y_true, y_pred=None, sample_weight=None):
            self.last.assign(k.mean(y_true))

        def reset_state(self):
            self.last.assign(0.0)

        def result(self):
            return {f"{self.name}_single": self.last + 0.0, f"{self.name}_double": 2 * self.last}

    def call(self, x, training):
        self.pair.update_state(x)

    return fit(k, subclassed(k, call, pair=Both("added")), y=X, metrics=[Both("compiled")])


# Order and listing.


def _many(k):
    """A model with metrics of every kind, in an order that is not that of their calls."""

    def layer(self, x):
        self.add_metric(k.mean(x), name="layer_named")
        self.add_metric(self.second(x))
        self.add_metric(self.first(x))
        self.inner(x)

    inner = adding(k, lambda self, x: self.add_metric(k.mean(x), name="inner"))
    attributes = {"first": k.metrics.Mean(name="first"), "second": k.metrics.Mean(name="second")}
    layer = adding(k, layer, **attributes, inner=inner)

    def call(self, x, training):
        self.layer(x)
        self.add_metric(k.mean(x), name="own_named")
        self.add_metric(self.own(x))

    return subclassed(k, call, layer=layer, own=k.metrics.Mean(name="own"))


@scenario
def history_is_in_the_order_of_the_metrics_owners_first(k):
    history = fit(k, _many(k), metrics=["mse"], validation_data=(X, ZEROS))
    return [list(history), history]


@scenario
def evaluate_returns_in_the_order_of_metrics_names(k):
    model = _many(k)
    fit(k, model, metrics=["mse"])
    values = model.evaluate(X, ZEROS, verbose=0)
    return [model.metrics_names, values, model.evaluate(X, ZEROS, verbose=0, return_dict=True)]


@scenario
def metrics_of_a_functional_model_exist_at_once(k):
    inputs = k.Input((1,))
    model = k.Model(inputs, identity(k)(adding(k, lambda self, x: self.add_metric(k.mean(x), name="in_layer"))(inputs)))
    model.add_metric(k.mean(inputs), name="symbolic")
    return sorted(m.name for m in model.metrics)


@scenario
def metrics_of_a_subclassed_model_exist_from_the_first_call(k):
    model = subclassed(k, lambda self, x, training: self.add_metric(k.mean(x), name="m"), own=k.metrics.Mean(name="a"))
    before = [m.name for m in model.metrics]
    model(X)
    return [before, [m.name for m in model.metrics]]


@scenario
def callbacks_see_running_values(k):
    seen = []

    class Sees(k.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs["m"])

    fit(k, functional(k, adding(k, lambda self, x: self.add_metric(k.mean(x), name="m"))), callbacks=[Sees()])
    return seen


@scenario
def early_stopping_follows_an_added_metric(k):
    model = functional(k, adding(k, lambda self, x: self.add_metric(k.mean(x), name="m")))
    stop = k.callbacks.EarlyStopping("val_m", mode="min", patience=1)
    return len(fit(k, model, epochs=5, validation_data=(X, ZEROS), callbacks=[stop])["val_m"])


# Custom train steps.


@scenario
def what_a_train_step_returns_of_its_metrics_is_logged(k):
    class Own(k.Model):
        def __init__(self):
            super().__init__()
            self.out = identity(k)
            self.tracker = k.metrics.Mean(name="tracker")

        def call(self, x, training=None):
            self.add_metric(self.tracker(x))
            return self.out(x)

        def train_step(self, data):
            self(data[0], training=True)
            return {m.name: m.result() for m in self.metrics if m.name != "loss"}

    return fit(k, Own(), loss=None)


# Losses.


@scenario
def a_loss_in_call_on_the_model_and_as_a_function(k):
    """The three ways in which Keras 2's tests add the same loss; it falls by 0.2 an epoch."""

    def call(self, x, y):
        outputs = x + self.bias
        self.add_loss(k.mean(k.abs(y - outputs)))
        return outputs

    def in_call():
        x, y = k.Input((1,)), k.Input((1,))
        return k.Model([x, y], _Bias(k, call)([x, y]))

    def symbolic():
        x, y = k.Input((1,)), k.Input((1,))
        outputs = _Bias(k)(x)
        model = k.Model([x, y], outputs)
        model.add_loss(k.mean(k.abs(y - outputs)))
        return model

    return [
        fit(k, make(), x=[X, X + 1], y=y, epochs=5, rate=0.1) for make in (in_call, symbolic) for y in (None, X + 1)
    ]


@scenario
def a_list_of_losses(k):
    return fit(k, losing(k, lambda y: [k.mean(y), 2 * k.mean(y)]), y=None)


@scenario
def a_function_without_arguments_on_a_layer(k):
    layer = _Bias(k)
    model = functional(k, layer)
    layer.add_loss(lambda: k.sum(k.square(layer.bias - 1.0)))
    return fit(k, model, rate=0.1)


@scenario
def a_function_without_arguments_on_a_model(k):
    layer = _Bias(k)
    model = functional(k, layer)
    model.add_loss(lambda: k.sum(k.square(layer.bias - 1.0)))
    return fit(k, model, y=None, rate=0.1)


@scenario
def sample_weights_weigh_the_compiled_loss_alone(k):
    return fit(k, losing(k, k.mean), sample_weight=X[:, 0])


@scenario
def evaluate_without_a_compiled_loss_returns_one_float(k):
    model = losing(k, k.mean)
    history = fit(k, model, y=None)
    return [history, model.evaluate(X, verbose=0), model.test_on_batch(X)]


@scenario
def dict_inputs_and_several_outputs(k):
    inputs = {"a": k.Input((1,), name="a"), "b": k.Input((1,), name="b")}
    outputs = [identity(k)(inputs["a"]), identity(k)(inputs["b"])]
    model = k.Model(inputs, outputs)
    model.add_loss(k.mean(outputs[0]) + 2 * k.mean(outputs[1]))
    return fit(k, model, x={"a": X, "b": X + 1}, y=None)


@scenario
def a_generator_without_targets(k):
    model = losing(k, k.mean)
    model.compile(k.optimizers.SGD(0.0))
    batches = ((X[i : i + 5], None) for _ in range(2) for i in (0, 5))
    return model.fit(batches, steps_per_epoch=2, epochs=2, verbose=0).history


@scenario
def no_loss_at_all_is_an_error(k):
    return error(fit, k, functional(k), y=None)


@scenario
def inputs_is_swallowed_and_other_keywords_are_an_error(k):
    return [fit(k, losing(k, k.mean, inputs=True), y=None), error(fit, k, losing(k, k.mean, how="mean"), y=None)]


@scenario
def losses_of_inner_calls_are_kept_and_those_of_earlier_ones_cleared(k):
    layer = adding(k, lambda self, x: self.add_loss(k.sum(x)))

    def call(self, x, training):
        self.layer(self.out(x))
        self.layer(2 * self.out(x))
        self.add_loss(0.5)

    model = subclassed(k, call, layer=layer)
    model(X)
    model(X)
    return [sorted(float(v) for v in model.losses), fit(k, model, y=None)]


@scenario
def a_vector_as_a_loss_is_logged_as_its_mean(k):
    return fit(k, losing(k, lambda y: y[:, 0]), y=None)


@scenario
def added_losses_are_part_of_the_loss_in_evaluation(k):
    def call(self, x, training):
        self.add_loss(k.mean(self.out(x)))
        if training:
            self.add_loss(100.0)

    model = subclassed(k, call)
    history = fit(k, model, validation_data=(X, ZEROS))
    return [history, model.evaluate(X, ZEROS, verbose=0, return_dict=True)["loss"]]


@scenario
def losses_in_a_custom_loop(k):
    def call(self, x, y):
        outputs = x + self.bias
        self.add_loss(k.mean(k.abs(y - outputs)))
        self.add_loss(k.mean(k.abs(y - outputs)))
        return outputs

    def train(layer, wrap):
        optimizer = k.optimizers.SGD(0.05)
        layer([tf.constant(X), tf.constant(X + 1)])
        if hasattr(optimizer, "build"):
            optimizer.build(layer.trainable_variables)

        def step(x, y):
            with tf.GradientTape() as tape:
                layer([x, y])
                loss = sum(layer.losses)
            variables = layer.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
            return loss

        step = wrap(step)
        return [float(step(tf.constant(X), tf.constant(X + 1))) for _ in range(5)]

    return [train(_Bias(k, call), tf.function), train(_Bias(k, call), lambda f: f)]


@scenario
def one_number_in_every_mode(k):
    def run(**mode):
        def call(self, x, training):
            self.add_loss(k.mean(self.out(x)))
            self.add_metric(k.sum(self.out(x)), name="m")

        return fit(k, subclassed(k, call), batch_size=5, rate=0.001, **mode)

    return [run(), run(run_eagerly=True), run(steps_per_execution=2), run(jit_compile=True)]


if __name__ == "__main__":
    tf.config.run_functions_eagerly(True)  # several times faster than tracing steps that run four times
    results = {}
    for name, run in SCENARIOS.items():
        try:
            results[name] = run(keras2())
        except Exception as failed:
            results[name] = f"failed: {type(failed).__name__}: {failed}"
    print(json.dumps(results, default=float))
