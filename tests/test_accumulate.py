"""`compile(accumulate=k)`: k batches make one update, exactly that of one batch k times as large."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfloop
from tfloop.loop.accumulation import accumulated
from tfloop.loop.source import make_source

X = np.random.default_rng(0).normal(size=(22, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(22, 2)).astype("float32")
MODES = [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": "step"}, {"jit_compile": "loop"}]


def net(accumulate=1, rate=0.1, **compiled):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, activation="tanh", name="hidden", kernel_regularizer="l2")(inputs)
    model = tfloop.Model(inputs, layers.Dense(2, name="out")(hidden))
    model.add_loss(lambda t: ops.mean(t["hidden"] ** 2), name="size", weight=0.3)
    model.add_metric(lambda t: ops.max(t["x"]), name="largest", aggregation="max")
    model.add_metric(lambda t: ops.norm(t["gradients/out/kernel"]), name="slope")
    model.watch("updates/*/kernel", "norm")
    optimizer = keras.optimizers.Adam(rate, global_clipnorm=1.0)
    model.compile(optimizer, "mse", metrics=["mae"], accumulate=accumulate, **compiled)
    return model


def fit(model, batch_size, x=X, y=Y, **kwargs):
    return model.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0, **kwargs).history


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_it_is_one_larger_batch(mode):
    small, large = net(accumulate=3, **mode), net(**mode)
    got, expected = fit(small, 2), fit(large, 6)  # 22 = 3 * 6 + 4: the last update has two batches
    assert list(got) == list(expected)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(small.get_weights()[0], large.get_weights()[0], rtol=1e-4, atol=1e-6)


def test_steps_schedules_and_averages_count_updates():
    seen = []
    model = net(accumulate=3)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([4], [0.1, 0.0])
    model.compile(keras.optimizers.SGD(schedule), "mse", accumulate=3)
    model.add_loss(lambda: 1.0, name="clock", weight=lambda step: seen.append(step) or ops.cast(step, "float32"))
    average = tfloop.WeightAverage("swa")
    history = fit(model, 2, callbacks=[average])
    assert int(model.optimizer.iterations) == 8  # 4 updates an epoch
    assert int(average.count) == 8
    np.testing.assert_allclose(history["clock"], [(0 + 1 + 2) * 6 / 22 + 3 * 4 / 22, (4 + 5 + 6) * 6 / 22 + 7 * 4 / 22])


@pytest.mark.parametrize("form", ["dataset", "generator", "loader"])
def test_streams_are_grouped(form):
    batches = [(X[i : i + 2], Y[i : i + 2]) for i in range(0, 22, 2)]
    data = {
        "dataset": lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(2),
        "generator": lambda: iter(batches * 2),
        "loader": lambda: batches_of(batches),
    }[form]()
    small, large = net(accumulate=3), net()
    steps = {"steps_per_epoch": 11} if form == "generator" else {}
    got = small.fit(data, epochs=2, verbose=0, **steps).history
    expected = fit(large, 6)
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-4)


@pytest.mark.parametrize("form", ["arrays", "dataset", "generator", "PyDataset"])
def test_an_epoch_has_the_batches_it_was_given(form):
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 20, 4)]
    data = {
        "arrays": lambda: {"x": X[:20], "y": Y[:20], "batch_size": 4},
        "dataset": lambda: {"x": tf.data.Dataset.from_tensor_slices((X[:20], Y[:20])).batch(4).repeat()},
        "generator": lambda: {"x": itertools.cycle(batches)},
        "PyDataset": lambda: {"x": Listed(batches * 2)},
    }[form]()
    model = net(accumulate=2, rate=0.0)
    model.add_metric(lambda t: ops.sum(t["x"]), name="seen", aggregation="sum")
    seen = model.fit(**data, steps_per_epoch=3, epochs=3, shuffle=False, verbose=0).history["seen"]
    first, middle, last = X[:12].sum(), X[12:20].sum() + X[:4].sum(), X[4:16].sum()
    np.testing.assert_allclose(seen, [first, middle, last], rtol=1e-4)
    assert int(model.optimizer.iterations) == 6  # of 2 batches, and of the one that is left


@pytest.mark.parametrize("steps", [None, 3])
def test_groups_of_arrays_draw_from_nothing_global(steps):
    """So what a checkpoint says of NumPy's random numbers holds on a resume."""
    source, size = accumulated(make_source(X, Y, batch_size=4, steps=steps), 2)
    assert not source.may_draw and size == 4


def test_a_step_takes_apart_what_the_fit_gathers():
    def normed():
        inputs = keras.Input((3,))
        model = tfloop.Model(inputs, layers.BatchNormalization()(inputs))  # differs by how a batch is taken apart
        model.add_loss(lambda t: ops.mean(ops.abs(t["y_pred"])))
        model.compile(keras.optimizers.SGD(0.0), accumulate=2, jit_compile=False)
        return model

    model, whole, halves = normed(), normed().train_on_batch(X), fit(normed(), 11, y=None)["loss"]
    assert abs(whole - halves[0]) > 1e-3
    np.testing.assert_allclose(fit(model, 22, y=None)["loss"], whole, rtol=1e-5)
    np.testing.assert_allclose(fit(model, 11, y=None)["loss"], halves, rtol=1e-5)
    np.testing.assert_allclose(model.train_on_batch(X), whole, rtol=1e-5)  # a batch by itself makes an update


class Listed(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def batches_of(batches):
    class Loader:
        def __iter__(self):
            return iter(batches)

    return Loader()


def test_power_iterations_see_one_step():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = tfloop.Model(inputs, tfloop.SpectralNormalization(layers.Dense(2))(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse", accumulate=3)
    moved = []
    model.layers[1].layer.kernel.assign(np.random.default_rng(2).normal(size=(3, 2)))
    u = next(v for v in model.weights if v.name == "u")
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: moved.append(u.numpy()))
    start = u.numpy()
    model.fit(X[:6], Y[:6], batch_size=2, shuffle=False, verbose=0, callbacks=[watch])
    kernel = model.layers[1].layer.kernel.numpy()
    v = kernel.T @ start.ravel() if start.size == 3 else kernel @ start.ravel()
    once = kernel @ v if start.size == 3 else kernel.T @ v
    np.testing.assert_allclose(moved[0].ravel(), once / np.linalg.norm(once), rtol=1e-4)


def test_embeddings_and_two_optimizers():
    class Two(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.table = layers.Embedding(5, 2)
            self.out = layers.Dense(1)
            self.first, self.second = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.2)

        def call(self, x):
            return self.out(self.table(x))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = ops.mean((self(x, training=True) - y) ** 2)
            self.minimize(loss, self.table.trainable_variables, self.first, tape=tape)
            self.minimize(loss, self.out.trainable_variables, self.second, tape=tape)
            return {"loss": loss}

    def trained(batch_size, accumulate):
        keras.utils.set_random_seed(0)
        model = Two()
        model.compile(accumulate=accumulate)
        x = np.random.default_rng(0).integers(0, 5, 20)
        history = model.fit(x, x[:, None].astype("float32"), batch_size=batch_size, shuffle=False, epochs=2, verbose=0)
        return history.history["loss"], model.get_weights()

    (losses, weights), (losses2, weights2) = trained(3, 2), trained(6, 1)
    np.testing.assert_allclose(losses, losses2, rtol=1e-5)
    for a, b in zip(weights, weights2, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_loss_scaling_counts_updates():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = net(accumulate=3)
        fit(model, 2)
        assert int(model.optimizer.iterations) == 8
    finally:
        keras.config.set_dtype_policy("float32")


def test_an_optimizer_of_several_counts_updates_in_all_of_them():
    def made(accumulate):
        model = net()
        chosen = keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.1), {".*/bias": keras.optimizers.SGD(0.1)})
        model.compile(keras.optimizers.MultiOptimizer(chosen), "mse", accumulate=accumulate)
        return model

    small, large = made(3), made(1)
    fit(small, 2), fit(large, 6)
    assert [int(o.iterations) for o in (small.optimizer, *small.optimizer.optimizers)] == [8, 8, 8]
    for one, other in zip(small.get_weights(), large.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="accumulate"):
        net(accumulate=value)
