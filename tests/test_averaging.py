"""Averages against NumPy over saved snapshots, and the swap, byte for byte."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfloop import reproducibility
from tfloop.averaging import WeightAverage, averaged
from tfloop.batch_norm import reestimate_batch_norm
from tfloop.model import Model
from tfloop.runs.run import Run


def network(seed=0, dtype=None):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, activation="tanh", dtype=dtype),
            layers.BatchNormalization(dtype=dtype),
            layers.Dense(2, dtype=dtype),
        ]
    )


def trained(model, running, updates, first=0, jit=False, compiled=False):
    """Steps as the loop makes them; the weights after every update, those before the first as well."""
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    x = tf.constant(np.random.default_rng(0).normal(size=(8, 3)), "float32")

    @tf.function(jit_compile=jit)
    def step(updates):
        with tf.GradientTape() as tape:
            loss = ops.mean((ops.cast(model(x, training=True), "float32") - 1.0) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        running.update(updates + 1, compiled=compiled)

    running.build(model)
    if first == 0:
        running.begin()
    history = [[w.numpy().copy() for w in model.trainable_weights]]
    for count in range(first, first + updates):
        step(tf.constant(count, tf.int64))
        history.append([w.numpy().copy() for w in model.trainable_weights])
    return history


def values(running):
    return [v.numpy().copy() for v in running.state().values()][:-1]


def expected(snapshots, running):
    result = [w.astype("float64") for w in snapshots[0]]
    for n, snapshot in enumerate(snapshots[1:], start=1):
        share = 1 / (n + 1) if running.kind == "swa" else 1 - running.decay
        result = [a + share * (w - a) for a, w in zip(result, snapshot, strict=True)]
    return result


@pytest.mark.parametrize("kind", ["swa", "ema"])
@pytest.mark.parametrize(
    "start, every, due",
    [(0, 1, range(11)), (1, 1, range(1, 11)), (0, 4, [0, 4, 8]), (3, 2, [3, 5, 7, 9])],
)
def test_average_is_that_of_the_snapshots_that_were_due(kind, start, every, due):
    model, running = network(), WeightAverage(kind, start=start, every=every, decay=0.7)
    history = trained(model, running, 10)
    assert int(running.count) == len(due)
    for got, want in zip(values(running), expected([history[i] for i in due], running), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_mean_of_snapshots_is_numpys_mean():
    model, running = network(), WeightAverage("swa")
    history = trained(model, running, 10)
    for i, got in enumerate(values(running)):
        np.testing.assert_allclose(got, np.mean([h[i] for h in history[1:]], 0), rtol=1e-5, atol=1e-7)


def test_compiled_step_gives_the_same_average():
    results = []
    for compiled in (False, True):
        for jit in (False, True):
            model, running = network(), WeightAverage("ema", start=2, every=3, decay=0.5)
            trained(model, running, 9, jit=jit, compiled=compiled)
            assert int(running.count) == 3
            results.append(values(running))
    for graph, *others in zip(*results, strict=True):
        for other in others:
            np.testing.assert_allclose(graph, other, rtol=1e-5, atol=1e-6)


def test_resume_in_the_middle_goes_on_with_the_same_average():
    model, whole = network(), WeightAverage("swa", start=2, every=3)
    trained(model, whole, 12)
    model, part = network(), WeightAverage("swa", start=2, every=3)
    trained(model, part, 6)
    saved = {name: v.numpy().copy() for name, v in part.state().items()}
    resumed = WeightAverage("swa", start=2, every=3)
    resumed.build(model)
    for name, variable in resumed.state().items():
        variable.assign(saved[name])
    trained(model, resumed, 6, first=6)
    assert int(resumed.count) == int(whole.count) == 4
    for a, b in zip(values(resumed), values(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_step_without_an_update_takes_no_snapshot():
    model, running = network(), WeightAverage()
    running.build(model)
    for applied in (False, True, False):
        running.update(tf.constant(1, tf.int64), applied=tf.constant(applied))
    assert int(running.count) == 1


def test_state_is_named_after_the_weights():
    model, running = network(), WeightAverage()
    running.build(model)
    weights = reproducibility.weights(model)
    trainable = {f"average/{path}" for path, w in weights.items() if w.trainable}
    assert set(running.state()) == trainable | {"average/count"}


def test_half_precision_weights_are_averaged_in_float32():
    model, running = network(dtype="bfloat16"), WeightAverage("swa")
    history = trained(model, running, 5)
    for i, got in enumerate(values(running)):
        assert got.dtype == "float32"
        want = np.mean([h[i].astype("float64") for h in history[1:]], 0)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    with averaged(model):
        assert model.weights[0].dtype == "bfloat16"


def test_averaged_swaps_in_and_back_byte_for_byte():
    model, running = network(), WeightAverage()
    trained(model, running, 5)
    model.weights[0].assign(np.full((3, 4), np.nan))
    before = [w.numpy().tobytes() for w in model.weights]
    with averaged(model) as same:
        assert same is model
        for weight, value in zip(model.trainable_weights, values(running), strict=True):
            np.testing.assert_array_equal(weight, value)
        assert model.layers[1].moving_mean.numpy().tobytes() == before[4]
    assert [w.numpy().tobytes() for w in model.weights] == before


def test_averaged_takes_back_what_was_changed_inside():
    model, running = network(), WeightAverage()
    trained(model, running, 5)
    before = [w.numpy().tobytes() for w in model.weights]
    with averaged(model):
        reestimate_batch_norm(model, np.ones((8, 3), "float32"), verbose=0)
        assert [w.numpy().tobytes() for w in model.weights] != before
    assert [w.numpy().tobytes() for w in model.weights] == before


def test_averaged_restores_under_an_exception():
    model, running = network(), WeightAverage()
    trained(model, running, 5)
    before = [w.numpy().tobytes() for w in model.weights]
    with pytest.raises(KeyboardInterrupt), averaged(model):
        raise KeyboardInterrupt
    assert [w.numpy().tobytes() for w in model.weights] == before
    assert not running.swapped


def test_averaged_does_not_nest_and_the_outer_one_still_restores():
    model, running = network(), WeightAverage()
    trained(model, running, 5)
    before = [w.numpy().tobytes() for w in model.weights]
    with averaged(model):
        with pytest.raises(RuntimeError, match="does not nest"), averaged(model):
            pass
        assert running.swapped
    assert [w.numpy().tobytes() for w in model.weights] == before


def test_averaged_needs_a_snapshot():
    model = network()
    with pytest.raises(ValueError, match="no running average"), averaged(model):
        pass
    WeightAverage(start=100).build(model)
    with pytest.raises(ValueError, match="after update 100"), averaged(model):
        pass


def test_validation_uses_the_average_when_asked_and_there():
    model = network()
    plain, validated = WeightAverage(), WeightAverage(validate=True)
    for running, swapped in ((plain, False), (validated, True)):
        running.build(model)
        with running.for_validation(model):
            assert not running.swapped
        running.update(1)
        with running.for_validation(model):
            assert running.swapped == swapped


@pytest.mark.parametrize("arguments", [{"kind": "mean"}, {"start": -1}, {"every": 0}, {"every": 1.5}, {"decay": 1.0}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        WeightAverage(**arguments)


def test_keras_own_fit_is_told_what_is_missing():
    model = network()
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match=r"tfloop\.Model"):
        model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0, callbacks=[WeightAverage()])


def fitted(callbacks, epochs=3, train=None, **arguments):
    """A model of tfloop's, trained for 4 updates an epoch."""
    x_in = keras.Input((3,))
    model = Model(x_in, layers.Dense(2)(layers.Dense(3, activation="tanh")(x_in)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).normal(size=(14, 3)).astype("float32")
    train = functools.partial(train, model) if train else model.fit
    train(x, x[:, :2], batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **arguments)
    return model


class Snapshots(keras.callbacks.Callback):
    """The weights before the first update and after every one: its hooks make chunks of one step."""

    def on_train_begin(self, logs=None):
        self.weights = [[w.numpy().copy() for w in self.model.weights]]

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append([w.numpy().copy() for w in self.model.weights])


@pytest.mark.parametrize("start, every, due", [(0, 1, range(13)), (1, 1, range(1, 13)), (3, 4, [3, 7, 11])])
def test_fit_takes_the_snapshots_that_are_due(start, every, due):
    running, snapshots = WeightAverage("swa", start, every), Snapshots()
    keras.utils.set_random_seed(0)
    fitted([running, snapshots])
    history = [snapshots.weights[i] for i in due]
    in_chunks = WeightAverage("swa", start, every)
    keras.utils.set_random_seed(0)
    fitted([in_chunks])
    for average in (running, in_chunks):
        for got, want in zip(values(average), expected(history, average), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [slice(None), slice(1, 3)], ids=["all", "some"])
def test_what_is_averaged_is_what_was_trainable_at_compile(frozen):
    running, snapshots = WeightAverage(), Snapshots()
    model = Model(x := keras.Input((3,)), layers.Dense(2)(layers.Dense(3)(x)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    for layer in [model, *model.layers][frozen]:
        layer.trainable = False
    model.fit(np.ones((8, 3)), np.ones((8, 2)), batch_size=4, verbose=0, callbacks=[running, snapshots])
    assert np.any(snapshots.weights[0][0] != snapshots.weights[1][0])
    with averaged(model):
        for weight, *history in zip(model.weights, *snapshots.weights[1:], strict=True):
            np.testing.assert_allclose(weight, np.mean(history, axis=0), rtol=1e-5, atol=1e-7)


def test_fit_validates_with_the_average_when_asked():
    x = np.ones((4, 3), "float32")
    losses = {}
    for validate in (False, True):
        keras.utils.set_random_seed(0)
        model = fitted([WeightAverage(validate=validate)], validation_data=(x, x[:, :2]))
        losses[validate] = model.history.history["val_loss"][-1]
        with averaged(model):
            of_average = model.evaluate(x, x[:, :2], verbose=0)
    assert losses[True] == pytest.approx(of_average, rel=1e-6)
    assert losses[False] != pytest.approx(of_average, rel=1e-3)


def test_running_average_is_part_of_the_fingerprint():
    keras.utils.set_random_seed(0)
    model = fitted([running := WeightAverage()])
    before = reproducibility.fingerprint(model)
    running.state()["average/count"].assign_add(1)
    assert reproducibility.fingerprint(model) != before


def test_fit_inside_averaged_is_refused():
    model = fitted([WeightAverage()])
    with averaged(model), pytest.raises(RuntimeError, match="averaged weights"):
        model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0, callbacks=[WeightAverage()])
    with averaged(model), pytest.raises(RuntimeError, match="averaged weights"):
        model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))


def test_an_average_given_to_another_model_is_no_longer_the_first_one_s():
    first, second = fitted([running := WeightAverage()]), fitted([running])
    with pytest.raises(ValueError, match="no running average"), averaged(first):
        pass
    before = reproducibility.fingerprint(second)
    with averaged(second), pytest.raises(RuntimeError, match="averaged weights"):
        fitted([running])
    assert reproducibility.fingerprint(second) == before


def test_resumed_run_goes_on_with_the_average(tmp_path, caplog):
    def train(folder, epochs):
        run, running = Run(folder, seed=1, log=()), WeightAverage(start=3, every=2)
        model = fitted([running], epochs, train=run.fit)
        return reproducibility.fingerprint(model), int(running.count)

    train(tmp_path / "parts", 1)
    assert train(tmp_path / "parts", 3) == train(tmp_path / "whole", 3)
    assert "WeightAverage" not in caplog.text  # nothing of it begins anew


class Parts(Model):
    """A step that calls the model's parts alone: the model itself is never called, and never built."""

    def __init__(self):
        super().__init__()
        self.part = keras.Sequential([keras.Input((3,)), layers.Dense(1, use_bias=False)])

    def train_step(self, x):
        return {"norm": self.minimize(lambda: ops.mean(self.part(x) ** 2), self.part.trainable_variables)}


def test_a_model_that_is_never_called_is_averaged():
    model, running = Parts(), WeightAverage("swa", start=2)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    seen = []
    keep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_: seen.append(model.part.get_weights()[0]))
    model.fit(np.ones((12, 3), "float32"), batch_size=4, verbose=0, callbacks=[running, keep])
    with averaged(model):
        np.testing.assert_allclose(model.part.get_weights()[0], np.mean(seen[1:], 0), rtol=1e-6)
