"""What a step sees: names, reasons, tags, control flow, threads, and what it costs."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfloop


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.encoder = layers.Dense(3)
        self.blocks = [layers.Dense(3), layers.Dense(3)]

    def call(self, x):
        x = tfloop.tag(self.encoder(x) * 2.0, "doubled")
        for block in self.blocks:
            x = block(x)
        return self.blocks[1](x)


NAMES = ["encoder", "doubled", "blocks/0", "blocks/1", "blocks/1:1"]


def run(mode, function, *args):
    if mode == "eager":
        return function(*args)
    return tf.function(function, jit_compile=mode == "jit")(*args)


@pytest.mark.parametrize("mode", ["eager", "graph", "jit"])
def test_layer_outputs_tags_and_further_calls_have_names(mode):
    model = Net()
    x = tf.ones((2, 4))
    model(x)
    seen = []

    def step(x):
        with tfloop.capture(model) as t:
            model(x)
        seen.append(list(t))
        return t["doubled"], t["blocks/1:1"]

    doubled, last = run(mode, step, x)
    assert seen[0] == NAMES
    np.testing.assert_allclose(doubled, 2 * model.encoder(x), rtol=1e-6)
    np.testing.assert_allclose(last, model(x), rtol=1e-5)


def test_a_key_of_an_output_does_not_hide_the_layer_of_its_name():
    class Gaussian(layers.Layer):
        def __init__(self):
            super().__init__()
            self.mean = layers.Dense(2)

        def call(self, x):
            return {"mean": 10.0 * self.mean(x), "other": x}

    class Whole(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = Gaussian()

        def call(self, x):
            return self.encoder(x)["mean"] + self.encoder(2.0 * x)["mean"]

    model = Whole()
    with tfloop.capture(model) as t:
        model(np.ones((2, 4), "float32"))
    assert list(t) == [
        *("encoder/mean", "encoder/mean:1", "encoder/other"),
        *("encoder/mean:2", "encoder:1/mean", "encoder:1/other"),
    ]
    np.testing.assert_allclose(t["encoder/mean:1"], 10.0 * t["encoder/mean"], rtol=1e-6)
    np.testing.assert_allclose(t["encoder:1/mean"], 20.0 * t["encoder/mean"], rtol=1e-6)


def test_names_of_layers_are_not_those_of_the_step():
    inputs = keras.Input((3,))
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="kernel")], name="weights")
    model = keras.Model(inputs, layers.Dense(2, name="y")(inner(inputs)))
    with tfloop.capture(model) as t:
        model(np.ones((2, 3), "float32"))
    assert list(t) == ["weights:1/kernel", "weights", "y:1"]
    for name in ("y", "x/0", "losses/a"):
        with pytest.raises(ValueError, match="the step's own"), tfloop.capture(model):
            tfloop.tag(tf.ones(1), name)


def test_structures_are_flattened_into_names():
    lstm = layers.LSTM(3, return_state=True)
    inputs = keras.Input((4, 2))
    model = keras.Model(inputs, lstm(inputs))
    with tfloop.capture(model) as t:
        model(np.ones((2, 4, 2)))
    assert list(t) == [f"{lstm.name}/{i}" for i in range(3)]


def test_a_wrong_name_is_answered_with_the_nearest():
    model = Net()
    with tfloop.capture(model) as t:
        model(np.ones((2, 4)))
    with pytest.raises(KeyError, match="Did you mean 'encoder'"):
        t["encodr"]
    with pytest.raises(TypeError):
        t["encoder"] = 1


def test_a_layer_that_was_not_called_is_said_so():
    model = Net()
    model(np.ones((2, 4)))
    with tfloop.capture(model) as t:
        model.encoder(np.ones((2, 4)))
    assert list(t) == ["encoder"]
    with pytest.raises(KeyError, match="not called"):
        t["blocks/0"]


def test_select_keeps_full_names():
    model = Net()
    with tfloop.capture(model) as t:
        model(np.ones((2, 4)))
    assert list(t.select("blocks/*")) == ["blocks/0", "blocks/1", "blocks/1:1"]
    assert isinstance(t.select("nothing"), tfloop.Tensors)


@pytest.mark.parametrize("inner", ["while", "cond", "function"])
def test_a_tensor_made_inside_control_flow_is_left_out_with_its_reason(inner):
    class Inner(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)
            self.outer = layers.Dense(4)

        def call(self, x):
            if inner == "while":
                x = tf.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, self.dense(x)), (0, x))[1]
            elif inner == "cond":
                x = tf.cond(tf.reduce_sum(x) > 0, lambda: self.dense(x), lambda: x)
            else:
                x = tf.function(lambda x: self.dense(x))(x)
            return self.outer(x)

    model = Inner()
    model.dense.build((None, 4))
    model.outer.build((None, 4))

    @tf.function
    def step(x):
        with tfloop.capture(model) as t:
            model(x)
        assert list(t) == ["outer"]
        with pytest.raises(KeyError, match="cannot leave"):
            t["dense"]
        return t["outer"]

    step(tf.ones((2, 4)))


@pytest.mark.parametrize("eagerly", [True, False])
def test_a_layer_that_the_gradient_calls_again_counts_once(eagerly):
    class Ones(tfloop.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

        def call(self, x):
            self.add_metric(x, name="total", aggregation="sum")
            return tfloop.tag(x * self.scale, "tagged")

    class Recomputed(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.ones = Ones()
            self.ones.build((None, 3))

        def call(self, x):
            return tf.recompute_grad(self.ones)(x)

    model = Recomputed()
    model.watch("*", "mean")
    model.compile("sgd", "mse", run_eagerly=eagerly, jit_compile=False)
    logs = model.train_on_batch(np.ones((2, 3)), np.zeros((2, 3)), return_dict=True)
    assert list(logs) == ["loss", "total", "tagged/mean", "ones/mean"]
    assert logs["total"] == 6.0 and model.ones.scale < 1.0


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_an_rnn_cell_runs_in_a_loop_eagerly_too(mode):
    class Cell(layers.Layer):
        def __init__(self):
            super().__init__()
            self.state_size = 3
            self.dense = layers.Dense(3)

        def build(self, shape):
            self.dense.build((None, shape[-1]))

        def call(self, x, states):
            h = self.dense(x)
            return h, [h]

    model = keras.Sequential([layers.RNN(Cell(), name="rnn")])
    x = tf.ones((2, 4, 3))
    model(x)

    def step(x):
        with tfloop.capture(model) as t:
            model(x)
        assert list(t) == ["rnn"]
        return t["rnn"]

    assert run(mode, step, x).shape == (2, 3)


def test_tag_outside_a_step_returns_the_tensor_itself():
    x = tf.ones(3)
    assert tfloop.tag(x, "anything") is x


class Tagging(layers.Dense):
    def call(self, x):
        tfloop.tag(self.kernel, "used")
        return super().call(x)


@pytest.mark.parametrize("mode", ["eager", "graph", "jit"])
def test_a_tagged_variable_is_what_the_layer_used_then(mode):
    dense = Tagging(3)
    model = keras.Sequential([keras.Input((4,)), tfloop.SpectralNormalization(dense)])
    effective = model.layers[0].effective_weights()["kernel"].numpy()

    def step(x):
        with tfloop.capture(model) as t:
            model(x, training=False)
        dense.kernel.assign(ops.zeros((4, 3)))
        return t["used"]

    np.testing.assert_allclose(run(mode, step, tf.ones((2, 4))), effective, rtol=1e-6)


@pytest.mark.parametrize("name", ["x", "y_pred", "gradients/a", "encoder"])
def test_tag_refuses_names_that_belong_to_others(name):
    model = Net()
    model(np.ones((2, 4)))
    with tfloop.capture(model), pytest.raises(ValueError, match=name):
        tfloop.tag(tf.ones(2), name)


def test_each_thread_sees_its_own_calls():
    models = [Net(), Net()]
    barrier = threading.Barrier(2)
    found = {}

    def work(i):
        models[i](np.ones((2, 4)))
        with tfloop.capture(models[i]) as t:
            barrier.wait()
            models[i](np.full((2, 4), i, "float32"))
            barrier.wait()
        found[i] = dict(t)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert list(found[0]) == list(found[1]) == NAMES
    np.testing.assert_allclose(found[1]["encoder"], models[1].encoder(np.ones((2, 4))), rtol=1e-6)


def test_the_call_of_keras_is_as_it_was_after_a_capture():
    before = keras.Operation.__call__
    with tfloop.capture(Net()):
        assert keras.Operation.__call__ is not before
    assert keras.Operation.__call__ is before


def test_capturing_adds_no_operation_to_the_graph():
    model = Net()
    model(np.ones((2, 4)))

    def plain(x):
        return model(x)

    def captured(x):
        with tfloop.capture(model):
            return model(x)

    spec = tf.TensorSpec((None, 4))
    count = [len(tf.function(f).get_concrete_function(spec).graph.get_operations()) for f in (plain, captured)]
    assert count[0] == count[1]


def test_operations_of_a_functional_graph_have_their_names():
    x = keras.Input((4,))
    y = ops.mean(layers.Dense(3, name="hidden")(x), axis=-1)
    model = keras.Model(x, y)
    with tfloop.capture(model) as t:
        model(np.ones((2, 4)))
    assert list(t) == ["hidden", y._keras_history.operation.name]
