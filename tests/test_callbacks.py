"""Every Keras callback works in tfloop's loop, and sees what it sees under Keras."""

import csv

import keras
import numpy as np
import pytest
from keras import layers

import tfloop

X = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(20, 1)).astype("float32")


def regression(kind=tfloop.Model, rate=0.1):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = kind(inputs, layers.Dense(1)(inputs))
    model.compile(keras.optimizers.SGD(rate), "mse", metrics=["mae"])
    return model


def fit(model, *callbacks, epochs=3, **kwargs):
    arguments = {"batch_size": 8, "shuffle": False, "verbose": 0, "validation_data": (X, Y), **kwargs}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **arguments)


class Spy(keras.callbacks.Callback):
    """Writes down every hook that is called, with the names and values of its logs."""

    def __init__(self, weights=False):
        super().__init__()
        self.calls = []
        self.weights = weights

    def write(self, name, where, logs):
        values = {k: float(v) for k, v in (logs or {}).items() if k != "outputs"}
        weight = float(np.ravel(self.model.layers[-1].kernel)[0]) if self.weights else 0.0
        self.calls.append((name, where, values, weight))


def spying(name, indexed):
    if indexed:
        return lambda self, index, logs=None: self.write(name, index, logs)
    return lambda self, logs=None: self.write(name, None, logs)


for kind in ("train", "test"):
    for when in ("begin", "end"):
        setattr(Spy, f"on_{kind}_{when}", spying(f"on_{kind}_{when}", indexed=False))
        setattr(Spy, f"on_{kind}_batch_{when}", spying(f"on_{kind}_batch_{when}", indexed=True))
        setattr(Spy, f"on_epoch_{when}", spying(f"on_epoch_{when}", indexed=True))


def test_hooks_come_in_keras_order_with_keras_values():
    mine, theirs = Spy(weights=True), Spy(weights=True)
    fit(regression(), mine)
    fit(regression(keras.Model), theirs)
    assert [c[:-2] for c in mine.calls] == [c[:-2] for c in theirs.calls]
    for a, b in zip(mine.calls, theirs.calls, strict=True):
        if "batch_end" in a[0] or "epoch_end" in a[0]:
            assert set(a[-2]) == set(b[-2]), a[0]
            for name, value in b[-2].items():
                np.testing.assert_allclose(a[-2][name], value, rtol=1e-5, err_msg=f"{a[0]} {name}")
        np.testing.assert_allclose(a[-1], b[-1], rtol=1e-5, err_msg=a[0])  # the model as of that step


def test_every_hook_gets_a_dict_of_the_logs_that_keras_gives_it():
    def calls(kind):
        seen = []

        def note(name, *where_and_logs):
            *where, logs = where_and_logs
            seen.append((name, *where, type(logs), sorted(logs)))

        class Recording(keras.callbacks.Callback):
            def __getattribute__(self, name):
                if not name.startswith("on_"):
                    return super().__getattribute__(name)
                return lambda *where, **logs: note(name, *where, *logs.values())

        model = regression(kind)
        fit(model, Recording(), epochs=2)
        model.evaluate(X, Y, batch_size=8, callbacks=[Recording()], verbose=0)
        model.predict(X, batch_size=8, callbacks=[Recording()], verbose=0)
        return seen

    assert calls(tfloop.Model) == calls(keras.Model)


def test_early_stopping_restores_the_best_weights():
    stop = keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True, mode="max")
    model = regression()
    history = fit(model, stop, epochs=10).history
    assert len(history["loss"]) == 2
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0)[0], history["val_loss"][0], rtol=1e-5)


def test_rates_follow_schedulers_and_plateaus():
    seen = []
    log = keras.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: seen.append(logs["learning_rate"]))
    fit(regression(), keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1)), log)
    np.testing.assert_allclose(seen, [0.1, 0.05, 0.1 / 3], rtol=1e-6)
    model = regression()
    fit(model, keras.callbacks.ReduceLROnPlateau("loss", patience=1, mode="max", factor=0.5, min_delta=0), epochs=4)
    assert float(model.optimizer.learning_rate) < 0.1


def test_model_checkpoint_by_epoch_and_by_batch(tmp_path):
    fit(
        regression(),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}-{val_loss:.2f}.keras"),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "batch-{epoch}-{batch}.weights.h5", save_weights_only=True, save_freq=2
        ),
    )
    saved = sorted(p.name.split("-")[0] for p in tmp_path.iterdir())
    assert saved == ["1", "2", "3", "batch", "batch", "batch", "batch"]


def test_csv_logger_and_history_have_the_logs(tmp_path):
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(regression(), logger)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert history.epoch == [0, 1, 2]
    assert list(history.history) == ["loss", "mae", "val_loss", "val_mae"]
    np.testing.assert_allclose([float(r["val_mae"]) for r in rows], history.history["val_mae"], rtol=1e-6)


def test_terminate_on_nan():
    x = X.copy()
    x[3] = np.nan
    model = regression()
    history = model.fit(x, Y, epochs=3, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert len(history.epoch) == 1


def test_backup_and_restore_goes_on_at_the_next_epoch(tmp_path):
    class Fail(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise RuntimeError("power cut")

    model = regression()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model, keras.callbacks.BackupAndRestore(tmp_path / "backup"), Fail(), epochs=4)
    again = regression()
    history = fit(again, keras.callbacks.BackupAndRestore(tmp_path / "backup"), epochs=4)
    assert history.epoch == [2, 3]
    whole = regression()
    fit(whole, epochs=4)
    np.testing.assert_allclose(again.get_weights()[0], whole.get_weights()[0], rtol=1e-6)


def test_swap_ema_weights():
    model = regression()
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), "mse")
    fit(model, keras.callbacks.SwapEMAWeights())
    reference = regression(keras.Model)
    reference.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), "mse")
    fit(reference, keras.callbacks.SwapEMAWeights())
    np.testing.assert_allclose(model.get_weights()[0], reference.get_weights()[0], rtol=1e-5)


def test_tensorboard_writes_event_files(tmp_path):
    fit(regression(), keras.callbacks.TensorBoard(tmp_path, update_freq="epoch", profile_batch=0))
    assert list((tmp_path / "train").iterdir()) and list((tmp_path / "validation").iterdir())


def test_progbar_logger_and_a_callback_list(capsys):
    model = regression()
    callbacks = keras.callbacks.CallbackList(
        [keras.callbacks.ProgbarLogger()], add_history=True, model=model, verbose=1, epochs=1, steps=3
    )
    assert model.fit(X, Y, batch_size=8, verbose=0, callbacks=callbacks).epoch == [0]
    assert "loss" in capsys.readouterr().out


def test_stop_training_in_the_middle_of_an_epoch():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 1

    model = regression()
    fit(model, Stop(), epochs=5)
    assert int(model.optimizer.iterations) == 2


def test_predict_on_a_part_in_a_batch_hook_moves_no_metric():
    class Predict(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.predict(X, verbose=0)

    def trained(*callbacks):
        model = regression()
        model.add_metric(lambda t: keras.ops.mean(t["y_pred"]), name="mean")
        return fit(model, *callbacks).history

    plain, disturbed = trained(), trained(Predict())
    for name, values in plain.items():
        np.testing.assert_allclose(disturbed[name], values, rtol=1e-6, err_msg=name)


def test_a_hook_set_on_a_callback_itself_sees_every_batch():
    seen = []
    callback = keras.callbacks.Callback()
    callback.on_train_batch_end = lambda batch, logs=None: seen.append(batch)
    fit(regression(), callback, epochs=2)
    assert seen == [0, 1, 2] * 2


def test_metric_objects_hold_each_batchs_values_for_a_callback_that_sees_batches():
    class Results(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_train_batch_end(self, batch, logs=None):
            self.seen.append([(metric.name, float(metric.result())) for metric in self.model.metrics[:1]])

    mine, theirs = Results(), Results()
    fit(regression(), mine)
    fit(regression(keras.Model), theirs)
    assert len(mine.seen) == 9
    for (found,), (expected,) in zip(mine.seen, theirs.seen, strict=True):
        assert found == (expected[0], pytest.approx(expected[1], rel=1e-5))


@pytest.mark.parametrize("method", ["evaluate", "test_on_batch", "train_on_batch"])
@pytest.mark.parametrize("hook", ["on_train_batch_begin", "on_train_batch_end", "on_test_batch_end"])
def test_what_a_batch_hook_evaluates_leaves_the_epochs_metrics_as_they_are(method, hook):
    class Evaluating(keras.callbacks.Callback):
        seen = []

    def evaluate(self, batch, logs=None):
        if batch < 2:  # the evaluation has hooks too
            options = {"verbose": 0} if method == "evaluate" else {}
            self.seen.append(getattr(self.model, method)(X[:5] + 1, Y[:5], **options)[1])

    setattr(Evaluating, hook, evaluate)
    expected = fit(regression(rate=0.0), epochs=2).history
    found = fit(regression(rate=0.0), Evaluating(), epochs=2).history
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)
    model = regression(rate=0.0)
    np.testing.assert_allclose(Evaluating.seen, model.evaluate(X[:5] + 1, Y[:5], verbose=0)[1], rtol=1e-5)
    np.testing.assert_allclose(model.get_metrics_result()["mae"], Evaluating.seen[0], rtol=1e-5)
