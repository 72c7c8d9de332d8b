"""`tfloop.Run` in code: history, callbacks, data of every kind, what is not finite, and what it refuses."""

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfloop
from tfloop import reproducibility
from tfloop.loop.observer import Observer
from tfloop.runs import checkpoint_file, rehearsal, sentry
from tfloop.runs.errors import CheckpointMismatch, ConfigError, LockedError
from tfloop.runs.guard import SpikeRule

X = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
Y = X.sum(1, keepdims=True)


def model(rate=0.05, dropout=0.2, **compiled):
    inputs = keras.Input((4,))
    hidden = layers.Dropout(dropout)(layers.Dense(8, activation="relu", name="hidden")(inputs))
    made = tfloop.Model(inputs, layers.Dense(1, name="out")(hidden))
    made.compile(keras.optimizers.Adam(rate), "mse", **{"jit_compile": False, **compiled})
    return made


def fit(folder, epochs, x=X, y=Y, make=None, run=None, **arguments):
    run = tfloop.Run(folder, **{"log": (), "seed": 3, **(run or {})})
    made = (make or model)()  # after the seed was set
    arguments = {"verbose": 0, **({"batch_size": 16} if isinstance(x, np.ndarray) else {}), **arguments}
    return run, made, run.fit(made, x, y, epochs=epochs, **arguments)


def rows(folder, split):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["split"] == split]


class StopAt(keras.callbacks.Callback):
    """An error in the middle of an epoch."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.step:
            raise InterruptedError


class Counts(keras.callbacks.Callback):
    """A user's callback with a state, an array among it."""

    def __init__(self):
        super().__init__()
        self.epochs, self.losses = 0, np.zeros(2)

    def on_epoch_end(self, epoch, logs=None):
        self.epochs += 1
        self.losses = np.append(self.losses, logs["loss"])

    def get_state(self):
        return {"epochs": self.epochs, "losses": self.losses}

    def set_state(self, state):
        self.epochs, self.losses = state["epochs"], state["losses"]


def test_the_history_is_that_of_the_whole_run(tmp_path):
    _, first, whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "run", 2)
    run, second, history = fit(tmp_path / "run", 4)
    assert history.history == whole.history and history.epoch == [0, 1, 2, 3]
    assert tfloop.fingerprint(first) == tfloop.fingerprint(second)
    assert run.steps == 12 and not run.was_finished
    again, third, history = fit(tmp_path / "run", 4)
    assert again.was_finished and history.history == whole.history
    assert tfloop.fingerprint(third) == tfloop.fingerprint(first)


def test_callbacks_go_on_with_their_state(tmp_path):
    def callbacks():
        stopping = keras.callbacks.EarlyStopping("loss", patience=3, restore_best_weights=True)
        return [Counts(), stopping, keras.callbacks.ReduceLROnPlateau("loss", patience=1, factor=0.5)]

    how = {"make": lambda: model(3.0), "validation_data": (X, Y)}
    whole, parts = callbacks(), callbacks()
    _, first, _ = fit(tmp_path / "whole", 8, **how, callbacks=whole)
    for step in (4, 11):
        with pytest.raises(InterruptedError):
            fit(tmp_path / "run", 8, **how, callbacks=[*callbacks(), StopAt(step)])
    _, second, _ = fit(tmp_path / "run", 8, **how, callbacks=parts)
    assert tfloop.fingerprint(first) == tfloop.fingerprint(second)
    assert parts[0].epochs == whole[0].epochs and np.array_equal(parts[0].losses, whole[0].losses)
    assert (parts[1].wait, parts[1].best, parts[1].best_epoch) == (whole[1].wait, whole[1].best, whole[1].best_epoch)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"best": [1.0, object()]}, r"callbacks/0/best/1 holds <object .*>, a object\."),
        ({"seen": {3: 1}}, r"callbacks/0/seen has the key 3\. A checkpoint's keys are strings\."),
    ],
)
def test_a_callback_whose_state_cannot_be_kept_is_refused_before_the_first_step(tmp_path, state, why):
    callback = Counts()
    callback.get_state = lambda: state
    with pytest.raises(TypeError, match=why):
        fit(tmp_path / "run", 2, callbacks=[callback])
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not (tmp_path / "run/summary.json").exists()


def test_a_tensor_that_a_callback_puts_into_the_logs_is_kept_as_a_number(tmp_path):
    class Rate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["rate"] = tf.constant(epoch + 0.5)

    fit(tmp_path / "run", 2, callbacks=[Rate()])
    _, _, history = fit(tmp_path / "run", 3, callbacks=[Rate()])
    assert [float(v) for v in history.history["rate"]] == [0.5, 1.5, 2.5]
    assert json.loads((tmp_path / "run/summary.json").read_text())["metrics"]["rate"] == 2.5


class Fails(keras.callbacks.Callback):
    """An error at the beginning or the end of an epoch, when other callbacks have seen it."""

    def __init__(self, when, at):
        super().__init__()
        setattr(self, when, lambda epoch, logs=None: self._fail(epoch == at))

    def _fail(self, now):
        if now:
            raise InterruptedError


class Halves(keras.callbacks.Callback):
    """Changes the state at the beginning and at the end of every epoch."""

    def _halve(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 0.5 * float(self.model.optimizer.learning_rate)

    on_epoch_begin = on_epoch_end = _halve


@pytest.mark.parametrize("when", ["on_epoch_begin", "on_epoch_end"])
@pytest.mark.parametrize("every", [2, "epoch"])
@pytest.mark.parametrize("validation", [None, (X[:8], Y[:8])])
def test_callbacks_see_an_epoch_begin_and_end_once(tmp_path, when, every, validation):
    given = {"run": {"checkpoint_every": every}, "validation_data": validation}
    counts = Counts()
    _, whole, expected = fit(tmp_path / "whole", 4, callbacks=[Halves(), Counts(), Fails(when, None)], **given)
    with pytest.raises(InterruptedError):
        fit(tmp_path / "run", 4, callbacks=[Halves(), Counts(), Fails(when, 2)], **given)
    _, resumed, found = fit(tmp_path / "run", 4, callbacks=[Halves(), counts, Fails(when, None)], **given)
    assert counts.epochs == 4 and found.history == expected.history
    assert tfloop.fingerprint(resumed) == tfloop.fingerprint(whole)


def test_an_epoch_that_a_callback_stopped_ends_after_a_resume(tmp_path):
    class Stops(keras.callbacks.Callback):
        def __init__(self, kills):
            super().__init__()
            self.kills = kills

        def on_train_batch_end(self, batch, logs=None):
            if int(self.model.optimizer.iterations) == 5:
                self.model.stop_training = True
                if self.kills:
                    os.kill(os.getpid(), signal.SIGTERM)

    given = {"validation_data": (X[:8], Y[:8])}
    _, _, expected = fit(tmp_path / "whole", 4, callbacks=[Stops(False)], **given)
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", 4, callbacks=[Stops(True)], **given)
    run, _, found = fit(tmp_path / "run", 4, callbacks=[Stops(False)], **given)
    assert found.history == expected.history and run.steps == 5 and not run.was_finished
    assert rows(tmp_path / "run", "epoch") == rows(tmp_path / "whole", "epoch")
    assert fit(tmp_path / "run", 4, **given)[0].was_finished


class Puts(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs |= {"vector": np.arange(3.0), "text": "x", "none": None, "number": np.float32(0.5)}


def test_what_is_no_number_in_the_logs_is_left_out_of_what_is_written(tmp_path):
    fit(tmp_path, 1, callbacks=[Puts()])
    _, _, history = fit(tmp_path, 2, callbacks=[Puts()], verbose=2, run={"log": ("csv", "tensorboard")})
    assert history.history["text"] == ["x", "x"]
    for row in (*rows(tmp_path, "epoch"), json.loads((tmp_path / "summary.json").read_text())["metrics"]):
        assert row["number"] == 0.5 and not {"vector", "text", "none"} & row.keys()


def test_a_run_orders_data_by_its_own_seed(tmp_path):
    alone = fit(tmp_path / "alone", 2, make=lambda: model(dropout=0))[2].history
    first = tfloop.Run(tmp_path / "first", seed=3, log=())
    made = model(dropout=0)
    tfloop.Run(tmp_path / "second", seed=4, log=())
    assert first.fit(made, X, Y, batch_size=16, epochs=2, verbose=0).history == alone
    assert reproducibility.current_seed() == 4


def test_a_metric_that_is_made_again_leaves_nothing_under_its_old_name(tmp_path):
    def make():
        made = model()
        made.compile("adam", "mse", metrics=[keras.metrics.AUC()], jit_compile=False)
        return made

    y = (Y > 0).astype("float32")
    with pytest.raises(InterruptedError):
        fit(tmp_path, 2, y=y, make=make, callbacks=[StopAt(5)])
    fit(tmp_path, 2, y=y, make=make)  # in the same process: Keras gives it another name
    assert [len(row) for row in rows(tmp_path, "epoch")] == [5, 5]


class NoCall(tfloop.Model):
    """Its `train_step` has layers and an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.out, self.own = layers.Dense(1), keras.optimizers.SGD(0.01)
        self.compile(jit_compile=False)  # with Keras' default optimizer

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self.out(x) - y) ** 2)
        self.minimize(loss, self.out.trainable_variables, self.own, tape=tape)
        return {"loss": loss}


def test_an_optimizer_that_no_step_uses_is_not_missed(tmp_path, caplog):
    fit(tmp_path, 1, make=NoCall)
    assert caplog.text == ""


class Slower(keras.callbacks.EarlyStopping):
    """A subclass of Keras' own with a count of its own, and something that no checkpoint can hold."""

    def __init__(self):
        super().__init__(patience=9)
        self.seen, self.lock, self.rates = 0, threading.Lock(), {"all": [np.float32(0.1)]}

    def on_epoch_begin(self, epoch, logs=None):
        self.seen += 1
        self.rates["all"].append(0.05 / self.seen)
        self.model.optimizer.learning_rate = self.rates["all"][-1]


class Scheduled(keras.callbacks.LearningRateScheduler):
    def __init__(self):
        super().__init__(self.rate)
        self.calls = 0

    def rate(self, epoch):
        self.calls += 1
        return 0.1 / self.calls


def average():
    made = model()
    made.compile(keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.9), "mse", jit_compile=False)
    return made


SWAP = functools.partial(keras.callbacks.SwapEMAWeights, swap_on_epoch=True)


@pytest.mark.parametrize("make, kind", [(model, Slower), (model, Scheduled), (average, SWAP)])
@pytest.mark.parametrize("ends", [StopAt(5), StopAt(7), Fails("on_epoch_begin", 2)], ids=["5", "7", "between epochs"])
def test_keras_callbacks_and_subclasses_go_on_with_what_they_keep(tmp_path, make, kind, ends, caplog):
    given = {"validation_data": (X[:8], Y[:8]), "make": make}
    _, whole, expected = fit(tmp_path / "whole", 4, callbacks=[kind()], **given)
    with pytest.raises(InterruptedError):
        fit(tmp_path / "run", 4, callbacks=[kind(), ends], **given)
    _, resumed, found = fit(tmp_path / "run", 4, callbacks=[kind()], **given)
    assert found.history == expected.history
    assert tfloop.fingerprint(resumed) == tfloop.fingerprint(whole)
    anew = [r.getMessage().split(": ")[1] for r in caplog.records if "begin anew" in r.getMessage()]
    assert anew == (["Slower.lock"] if kind is Slower else [])


def test_a_checkpoint_of_keras_is_made_after_the_same_batches(tmp_path):
    def names(folder, **given):
        saver = keras.callbacks.ModelCheckpoint(
            tmp_path / (folder.name + "-{epoch}-{batch}.weights.h5"), save_weights_only=True, save_freq=5
        )
        with contextlib.suppress(InterruptedError):
            fit(folder, 4, callbacks=[saver, *given.get("callbacks", ())])
        return sorted(path.name.removeprefix(folder.name) for path in tmp_path.glob(f"{folder.name}-*.h5"))

    names(tmp_path / "run", callbacks=[StopAt(8)])
    assert names(tmp_path / "run") == names(tmp_path / "whole") != []


class Ends(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        raise AssertionError("nothing is trained")

    def on_train_end(self, logs=None):
        raise AssertionError("nothing was trained")


def test_callbacks_hear_nothing_of_a_run_that_is_finished(tmp_path):
    log = tmp_path / "log.csv"
    for epochs in (2, 2, 3):
        _, _, history = fit(tmp_path / "run", epochs, callbacks=[keras.callbacks.CSVLogger(log)])
        assert history.epoch == list(range(epochs))
        assert [line.split(",")[0] for line in log.read_text().splitlines()] == ["epoch", *map(str, range(epochs))]
    run, _, _ = fit(tmp_path / "run", 3, callbacks=[Ends()])
    assert run.was_finished


def test_a_finished_run_gives_the_best_weights_again(tmp_path):
    ends = []
    for _ in range(2):
        stopping = keras.callbacks.EarlyStopping("loss", mode="max", patience=9, restore_best_weights=True)
        run, made, _ = fit(tmp_path / "run", 4, callbacks=[stopping])
        ends.append(tfloop.fingerprint(made))
    assert run.was_finished and stopping.best_epoch < 3
    assert ends[0] == ends[1] == json.loads((tmp_path / "run/summary.json").read_text())["fingerprint"]


class TwoOptimizers(tfloop.Model):
    """Its `train_step` builds its optimizers, in the first step."""

    def __init__(self, **how):
        super().__init__()
        self.parts = [layers.Dense(8), layers.Dense(1)]
        self.optimizers = {"first": keras.optimizers.Adam(0.05), "second": keras.optimizers.Adam(0.01)}
        self.compile(optimizer=None, **(how or {"jit_compile": False}))

    def call(self, x):
        return self.parts[1](self.parts[0](x))

    def train_step(self, data):
        x, y = data
        for part, optimizer in zip(self.parts, self.optimizers.values(), strict=True):
            loss = lambda: keras.ops.mean((self(x) - y) ** 2)
            self.minimize(loss, part.trainable_variables, optimizer)
        return {"loss": loss()}


@pytest.mark.parametrize("how", [{"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True}])
def test_optimizers_that_the_step_builds_go_on_with_their_moments(tmp_path, how):
    make = functools.partial(TwoOptimizers, **how)
    whole = fit(tmp_path / "whole", 4, make=make)[1]
    fit(tmp_path / "parts", 2, make=make)
    parts = fit(tmp_path / "parts", 4, make=make)[1]
    assert tfloop.fingerprint(parts) == tfloop.fingerprint(whole)


class Held:
    """A running mean of the loss that is no layer: a plain object, which Keras does not look into."""

    def __init__(self, module=False):
        self.inner = tf.Module() if module else type("Plain", (), {"__module__": __name__})()
        self.inner.value = tf.Variable(0.0, trainable=False)

    def __call__(self, loss):
        return self.inner.value.assign(0.9 * self.inner.value + 0.1 * loss)


def closed_over():
    value = tf.Variable(0.0, trainable=False)
    return lambda loss: value.assign(0.9 * value + 0.1 * loss)


def global_generator():
    tf.random.set_global_generator(tf.random.Generator.from_seed(3))
    return lambda loss: tf.random.get_global_generator().uniform(())


class Helped(tfloop.Model):
    """A model whose step depends on something that a helper keeps."""

    def __init__(self, helper):
        super().__init__()
        self.out, self.helper = layers.Dense(1), helper

    def call(self, x):
        return self.out(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            error = (self(x, training=True) - y) ** 2
            loss = tf.reduce_mean(error) * (1.0 + self.helper(tf.stop_gradient(tf.reduce_mean(error))))
        self.minimize(loss, self.trainable_variables, tape=tape)
        return {"loss": loss}


HELPERS = {"plain": Held, "module": lambda: Held(module=True), "closure": closed_over, "global": global_generator}


@pytest.mark.parametrize("kind", HELPERS)
def test_what_helpers_of_the_step_keep_is_kept(tmp_path, kind):
    def make():
        made = Helped(HELPERS[kind]())
        made.compile(keras.optimizers.SGD(0.01), jit_compile=False)
        return made

    _, whole, expected = fit(tmp_path / "whole", 3, make=make)
    with pytest.raises(InterruptedError):
        fit(tmp_path / "run", 3, make=make, callbacks=[StopAt(5)])
    _, resumed, found = fit(tmp_path / "run", 3, make=make)
    assert tfloop.fingerprint(resumed) == tfloop.fingerprint(whole)
    assert found.history == expected.history


def test_a_step_that_is_skipped_moves_nothing_in_a_helper(tmp_path):
    helper = Held()

    def make():
        made = Helped(helper)
        made.compile(keras.optimizers.SGD(0.01), jit_compile=False)
        return made

    fit(tmp_path / "run", 1, x=broken(3), make=make, run={"on_nan": "skip"})
    assert np.isfinite(helper.inner.value.numpy())


def test_random_numbers_whose_state_cannot_be_saved_are_told_of(tmp_path, caplog):
    def make():
        made = Helped(lambda loss: tf.random.uniform(()))
        made.compile(keras.optimizers.SGD(0.01), jit_compile=False)
        return made

    fit(tmp_path / "run", 1, make=make)
    assert "RandomUniform" in caplog.text and "tf.random.Generator" in caplog.text
    caplog.clear()
    fit(tmp_path / "other", 1)
    assert caplog.text == ""


class LazyMetrics(tfloop.Model):
    """A metric that makes its variables at its first update, and one that `metrics` leaves out."""

    def __init__(self):
        super().__init__()
        self.out, self.f1 = layers.Dense(2, activation="softmax"), keras.metrics.F1Score(average="macro")
        self.mae = keras.metrics.MeanAbsoluteError(name="mae")

    def call(self, x):
        return self.out(x)

    @property
    def metrics(self):
        return [self.f1]

    def train_step(self, data):
        x, y = data
        y = tf.concat([y, 1 - y], 1)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = tf.reduce_mean((y_pred - y) ** 2)
        self.minimize(loss, self.trainable_variables, tape=tape)
        self.f1.update_state(y, y_pred)
        self.mae.update_state(y, y_pred)
        return {"f1": self.f1.result(), "mae": self.mae.result()}


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("how", [{"jit_compile": False}, {"run_eagerly": True}], ids=["graph", "eager"])
def test_every_metric_goes_on_within_the_epoch(tmp_path, how, built):
    def make():
        made = LazyMetrics()
        if built:
            made(X)
        made.compile(keras.optimizers.SGD(0.1), **how)
        return made

    y = (np.sin(3 * Y) > 0).astype("float32")
    _, _, expected = fit(tmp_path / "whole", 2, y=y, make=make)
    with pytest.raises(InterruptedError):
        fit(tmp_path / "run", 2, y=y, make=make, callbacks=[StopAt(5)])
    _, _, found = fit(tmp_path / "run", 2, y=y, make=make)
    assert found.history == expected.history


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(40, seed=1).batch(16)


def generator():
    while True:
        for start in (0, 16, 32):
            yield X[start : start + 16], Y[start : start + 16]


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (dataset, {}),
        (lambda: dataset().repeat(), {"steps_per_epoch": 2}),
        (generator, {"steps_per_epoch": 3}),
        (lambda: X, {"steps_per_epoch": 2}),
        (lambda: X, {"shuffle": "batch", "sample_weight": np.ones(40)}),
    ],
)
def test_every_source_goes_on_where_it_was(tmp_path, data, arguments, capsys):
    keras.utils.set_random_seed(3)  # a dataset's own seeds are drawn when it is made
    y = Y if isinstance(data(), np.ndarray) else None
    _, first, _ = fit(tmp_path / "whole", 4, data(), y, **arguments)
    with pytest.raises(InterruptedError):
        fit(tmp_path / "run", 4, data(), y, callbacks=[StopAt(5)], **arguments)
    _, second, _ = fit(tmp_path / "run", 4, data(), y, **arguments)
    assert tfloop.fingerprint(first) == tfloop.fingerprint(second)
    assert ("counted through" in capsys.readouterr().err) == (y is None)


class Shuffling(keras.utils.PyDataset):
    """Draws its order, and noise, from NumPy's global random numbers, as is customary."""

    order = np.arange(40)

    def __len__(self):
        return 3

    def __getitem__(self, i):
        rows = self.order[16 * i : 16 * i + 16]
        return X[rows] + np.random.normal(size=(len(rows), 4)).astype("float32"), Y[rows]

    def on_epoch_end(self):
        self.order = np.random.permutation(40)


def picks():
    while True:
        rows = np.random.permutation(40)[:4]
        yield X[rows], Y[rows]


@pytest.mark.parametrize(("data", "steps", "stop"), [(Shuffling, None, 2), (Shuffling, None, 8), (picks, 9, 22)])
def test_data_that_draw_from_numpys_global_numbers_go_on_where_they_were(tmp_path, data, steps, stop):
    _, first, _ = fit(tmp_path / "whole", 4, data(), None, steps_per_epoch=steps)
    with pytest.raises(InterruptedError):
        fit(tmp_path / "run", 4, data(), None, callbacks=[StopAt(stop)], steps_per_epoch=steps)
    _, second, _ = fit(tmp_path / "run", 4, data(), None, steps_per_epoch=steps)
    assert tfloop.fingerprint(first) == tfloop.fingerprint(second)


def test_an_error_in_the_step_leaves_a_state_to_go_on_from(tmp_path):
    def explode(y, y_pred):
        return keras.ops.mean((y - y_pred) ** 2) + 0 * tf.gather(
            tf.zeros(3), tf.cast(y_pred[0, 0] * 0 + LIMIT[0], tf.int32)
        )

    LIMIT = tf.Variable([0.0])

    def make():
        made = model()
        made.compile("adam", explode, jit_compile=False)
        return made

    _, whole, _ = fit(tmp_path / "whole", 4, make=make)
    blow = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: LIMIT.assign([5.0 * (epoch == 2)]))
    with pytest.raises(tf.errors.InvalidArgumentError):
        fit(tmp_path / "run", 4, make=make, callbacks=[blow])
    LIMIT.assign([0.0])
    _, made, _ = fit(tmp_path / "run", 4, make=make)
    assert tfloop.fingerprint(made) == tfloop.fingerprint(whole)
    assert rows(tmp_path / "run", "train") == rows(tmp_path / "whole", "train")


# Not finite


def broken(row):
    x = X.copy()
    x[row] = np.inf
    return x


@pytest.mark.parametrize("how", [{}, {"jit_compile": "step"}, {"jit_compile": "loop"}, {"run_eagerly": True}])
def test_a_step_that_is_skipped_moves_nothing(tmp_path, how):
    states = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            states.append(tfloop.fingerprint(self.model))

    run, _, _ = fit(
        tmp_path, 1, broken(20), make=lambda: model(**how), run={"on_nan": "skip"}, shuffle=False, callbacks=[Look()]
    )
    assert states[0] == states[1] != states[2] and run.steps == 2
    assert [row["step"] for row in rows(tmp_path, "train")] == [1, 2]
    assert np.isfinite(rows(tmp_path, "epoch")[0]["loss"])


def test_too_many_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(sentry.NonFiniteError, match="20 steps in a row"):
        fit(tmp_path, 30, np.full_like(X, np.nan), run={"on_nan": "skip"})


def test_what_is_ignored_is_null_in_the_log(tmp_path):
    fit(tmp_path, 1, broken(20), run={"on_nan": "ignore"}, shuffle=False)
    assert [row["loss"] is None for row in rows(tmp_path, "train")] == [False, True, True]
    assert rows(tmp_path, "train")[1]["nonfinite"] == ["loss"]


def test_the_first_bad_tensor_is_a_gradient(tmp_path):
    made = model(dropout=0.0)
    made.add_loss(lambda t: keras.ops.mean(keras.ops.sqrt(t["hidden"] * 0.0)), name="root")
    with pytest.raises(sentry.NonFiniteError, match=r"'gradients/hidden/(bias|kernel)'"):
        fit(tmp_path, 1, make=lambda: made)
    assert tfloop.fingerprint(made) and all(np.isfinite(w).all() for w in made.get_weights())


def test_a_loss_scale_looks_after_its_own_gradients(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        run, _, _ = fit(tmp_path, 2)
        assert run.steps == 6
    finally:
        keras.config.set_dtype_policy("float32")


def test_a_run_with_an_optimizer_of_several_goes_on_where_it_was(tmp_path):
    def make():
        made = model()
        momentum = keras.optimizers.SGD(0.01, momentum=0.9)
        chosen = keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.05), {".*/bias": momentum})
        made.compile(keras.optimizers.MultiOptimizer(chosen), "mse", jit_compile=False)
        return made

    _, whole, _ = fit(tmp_path / "whole", 3, make=make)
    fit(tmp_path / "parts", 1, make=make)
    _, parts, _ = fit(tmp_path / "parts", 3, make=make)
    assert tfloop.fingerprint(parts) == tfloop.fingerprint(whole)
    assert [int(o.iterations) for o in parts.optimizer.optimizers] == [9, 9]


def test_a_spike_is_rolled_back(tmp_path):
    x = X.copy()
    x[20] *= 1e4
    rule = SpikeRule(factor=20.0, window=8, warmup=2)
    run, _, _ = fit(tmp_path, 2, x, run={"spike": rule, "on_nan": "rollback"}, batch_size=4, shuffle=False)
    losses = [row["loss"] for row in rows(tmp_path, "train")]
    assert len(losses) == run.steps == 18 and max(losses) < 1e4


# What is refused


def test_other_arguments_are_refused(tmp_path):
    fit(tmp_path, 1)
    with pytest.raises(ConfigError, match="flags/batch_size: 16 -> 8"):
        fit(tmp_path, 2, batch_size=8)
    with pytest.raises(ConfigError, match="data/examples: 40 -> 32"):
        fit(tmp_path, 2, X[:32], Y[:32])


def trained(optimizer=lambda: keras.optimizers.Adam(0.05), loss="mse", **compiled):
    def make():
        made = model()
        made.compile(optimizer(), loss, jit_compile=False, **compiled)
        return made

    return make


def mine(y, y_pred):
    return tf.reduce_mean((y - y_pred) ** 2)


SCHEDULE = keras.optimizers.schedules.CosineDecay
CODE = {
    "optimizer/learning_rate: 0.05": ({}, {"make": trained(lambda: keras.optimizers.Adam(0.01))}),
    "optimizer/class: 'Adam' -> 'SGD'": ({}, {"make": trained(lambda: keras.optimizers.SGD(0.05))}),
    "decay_steps: 10 -> 20": tuple(
        {"make": trained(lambda n=n: keras.optimizers.SGD(SCHEDULE(0.1, n)))} for n in (10, 20)
    ),
    "training/loss: 'mse' -> 'mae'": ({}, {"make": trained(loss="mae")}),
    "training/loss: 'mse' -> 'mine'": ({}, {"make": trained(loss=mine)}),
    "training/loss_weights: None -> 2.0": ({}, {"make": trained(loss_weights=2.0)}),
    "training/accumulate: 1 -> 2": ({}, {"make": trained(accumulate=2)}),
    "training/class_weight/1: 1.0 -> 9.0": ({"class_weight": {1: 1.0}}, {"class_weight": {1: 9.0}}),
    "training/class_weight": ({}, {"class_weight": {1: 9.0}}),
    "training/sample_weight: 'float64[40]": ({"sample_weight": np.ones(40)}, {"sample_weight": np.arange(40.0)}),
    "training/validation_freq: [1] -> [2]": ({"validation_freq": [1]}, {"validation_freq": [2]}),
}


@pytest.mark.parametrize("difference", CODE)
def test_what_the_code_trains_with_is_refused_with_the_difference(tmp_path, difference):
    before, now = CODE[difference]
    before, now = ({"y": (Y > 0).astype("float32"), **given} for given in (before, now))
    fit(tmp_path, 1, **before)
    fit(tmp_path, 2, **before)
    with pytest.raises(ConfigError, match=re.escape(difference)):
        fit(tmp_path, 3, **now)


def test_a_learning_rate_that_a_callback_changed_is_no_difference(tmp_path):
    run, made, _ = fit(tmp_path, 1, callbacks=[Halves()])
    run.fit(made, X, Y, batch_size=16, epochs=2, verbose=0, callbacks=[Halves()])
    fit(tmp_path, 3, callbacks=[Halves()])


def test_a_folder_that_an_earlier_version_made_goes_on(tmp_path):
    fit(tmp_path, 1)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    del told["training"]
    path.write_text(json.dumps(told))
    assert fit(tmp_path, 2, make=trained(loss="mae"))[0].steps == 6


def test_a_run_in_use_is_refused(tmp_path):
    run = tfloop.Run(tmp_path)
    with pytest.raises(LockedError):
        tfloop.Run(tmp_path)
    run.close()
    tfloop.Run(tmp_path).close()


def test_a_keras_model_is_refused_with_the_mend(tmp_path):
    with pytest.raises(TypeError, match=r"tfloop.Model\(model.inputs, model.outputs\)"):
        tfloop.Run(tmp_path).fit(keras.Sequential([layers.Dense(1)]), X, Y)


def test_another_model_is_refused_or_taken_in_part(tmp_path):
    def larger():
        inputs = keras.Input((4,))
        hidden = layers.Dense(8, activation="relu", name="hidden")(inputs)
        made = tfloop.Model(inputs, layers.Dense(1, name="out")(layers.Dense(3, name="new")(hidden)))
        made.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=False)
        return made

    _, first, _ = fit(tmp_path, 1)
    with pytest.raises(CheckpointMismatch, match="'new/kernel'"):
        fit(tmp_path, 2, make=larger)
    _, second, _ = fit(tmp_path, 1, make=larger, run={"resume": "partial"})
    assert np.array_equal(first.get_layer("hidden").kernel, second.get_layer("hidden").kernel)


# Rehearsals


def test_one_batch_to_overfit_is_not_split():
    x, y, arguments = rehearsal.one_batch(X, Y, {"batch_size": 16, "validation_split": 0.25})
    made = tfloop.Model(x_in := keras.Input((4,)), layers.Dense(1)(x_in))
    made.add_metric(lambda t: keras.ops.shape(t["x"])[0], name="examples")
    made.compile("sgd", "mse", jit_compile=False)
    assert made.fit(x, y, verbose=0, **arguments).history["examples"] == [16]


def test_a_verification_names_what_differs():
    made = model()
    assert rehearsal.verify(made, X, Y, batch_size=8, epochs=3) is None
    before = tfloop.fingerprint(made)

    class Unseeded(layers.Layer):
        def call(self, x):
            return x + tf.random.stateless_normal(tf.shape(x), tf.cast([time_now(), 1], tf.int32))

    inputs = keras.Input((4,))
    other = tfloop.Model(inputs, layers.Dense(1, name="out")(Unseeded()(inputs)))
    other.compile("sgd", "mse", jit_compile=False)
    assert "'out/kernel'" in rehearsal.verify(other, X, Y, batch_size=8)
    assert tfloop.fingerprint(made) == before


@pytest.mark.parametrize("how", [{"jit_compile": False}, {"run_eagerly": True}])
def test_a_verification_knows_optimizers_that_the_step_builds(how):
    made = TwoOptimizers(**how)
    assert rehearsal.verify(made, X, Y, batch_size=8, epochs=3) is None
    assert all(int(o.iterations.numpy()) == 0 for o in made.optimizers.values())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stream", ["shuffled", "endless", "generator"])
def test_a_verification_reads_a_stream_once(stream, accumulate):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(64).batch(8)
    steps = None if stream == "shuffled" else 4
    if stream == "endless":
        data = data.repeat()
    if stream == "generator":
        rng = np.random.default_rng(0)
        picks = (rng.integers(0, len(X), 8) for _ in itertools.count())
        data = ((X[rows], Y[rows]) for rows in picks)
    made = model()
    made.compile("sgd", "mse", jit_compile=False, accumulate=accumulate)
    assert rehearsal.verify(made, data, None, steps_per_epoch=steps, epochs=3) is None


def time_now():
    return tf.timestamp() * 1e6 % 1e9


def test_an_observer_that_does_nothing_changes_nothing():
    results = []
    for callbacks in ([], [Observer()]):
        keras.utils.set_random_seed(1)
        made = model()
        made.fit(X, Y, epochs=2, verbose=0, callbacks=callbacks)
        results.append(reproducibility.fingerprint(made))
    assert results[0] == results[1]


# Checkpoints


def test_the_best_epoch_is_kept_with_its_own_weights(tmp_path):
    run, made, history = fit(tmp_path, 6, make=lambda: model(1.5), run={"keep": 1, "best": "loss"})
    losses = history.history["loss"]
    best = int(np.argmin(losses))
    found = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert {int(path.name[5:]) for path in found} == {3 * (best + 1), run.steps}
    plain = model()
    tfloop.average(plain, [found[0]])
    assert tfloop.fingerprint(plain) != tfloop.fingerprint(made) or best == 5


@pytest.mark.parametrize("every", [5, "60s"])
def test_the_best_epoch_is_kept_whenever_else_is_saved(tmp_path, every):
    class Worse(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["score"] = [3.0, 1.0, 2.0, 4.0][epoch]

        def get_state(self):
            return {}

        def set_state(self, state):
            pass

    run = {"checkpoint_every": every, "keep": 1, "best": "score"}
    for epochs in (3, 4):
        fit(tmp_path, epochs, callbacks=[Worse()], run=run)
        assert "step-0000000006" in {path.name[:15] for path in (tmp_path / "checkpoints").iterdir()}


def test_checkpoints_by_seconds_are_within_epochs_too(tmp_path):
    fit(tmp_path, 3, run={"checkpoint_every": "0.001s", "keep": None}, callbacks=[StopAt(99)])
    steps = {int(path.name[5:15]) for path in (tmp_path / "checkpoints").glob("step-*")}
    assert 9 in steps and len(steps) > 1


def test_slow_disks_do_not_hold_up_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file.os, "fsync", lambda descriptor: time.sleep(0.3))
    began = time.monotonic()
    fit(tmp_path, 30, run={"checkpoint_every": 1})
    assert time.monotonic() - began < 30  # 90 saves of 1.5 s or more
