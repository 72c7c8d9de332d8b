"""What parts of tfloop cost: a run on disk, its guard and its checkpoints; single batches; spectral norm."""

import statistics
import tempfile
import time

import keras
import numpy as np
from keras import layers

import tfloop
from experiments.benchmark.rivals import Epochs


def runs(rounds):
    """Seconds a step of the small MLP: `fit`, a run on disk, with the guard."""
    steps = 400
    kinds: dict[str, dict] = {"run": {}, "run, guard": {"on_nan": "skip"}}
    x, y = examples(128 * steps)
    models = {name: small_mlp() for name in ("fit", *kinds)}

    def train(name, **how):
        if name == "fit":
            models[name].fit(x, y, batch_size=128, **how)
            return
        options = {"checkpoint_every": 10**9, "on_nan": "ignore", "log": (), **kinds[name]}
        with tempfile.TemporaryDirectory() as folder:
            tfloop.Run(f"{folder}/run", **options).fit(models[name], x, y, batch_size=128, **how)

    return in_turns({name: lambda name=name, **how: train(name, **how) for name in models}, steps, rounds)


def checkpoints(rounds):
    """Seconds a step of the small MLP in epochs of one run that save every 100 steps, and in those between."""
    steps = 430  # few saves are made at an epoch's end, and so written in the next one
    x, y = examples(128 * steps)
    with tempfile.TemporaryDirectory() as folder:
        run = tfloop.Run(f"{folder}/run", checkpoint_every=100, on_nan="ignore", log=())
        timer = Alternately(run)
        run.fit(small_mlp(), x, y, batch_size=128, epochs=20 * rounds + 11, verbose=0, callbacks=[timer])
    seconds = np.diff(timer.begins)[10:] / steps
    return {"saving nothing": float(np.median(seconds[::2])), "saving": float(np.median(seconds[1::2]))}


class Alternately(keras.callbacks.Callback):
    """Lets a run save as it was told in its odd epochs only. Keeps the times at which epochs begin."""

    def __init__(self, run):
        super().__init__()
        self.run, self.every, self.begins = run, run.every, []

    def on_epoch_begin(self, epoch, logs=None):
        self.run.every = self.every if epoch % 2 else self.every._replace(steps=10**9)
        self.begins.append(time.perf_counter())


def single_batches(rounds):
    """Seconds a batch of the small MLP where Python sees each: a callback's hook, and the `..._on_batch` methods."""
    steps = 100
    x, y = examples(128 * steps)
    batch = x[:128], y[:128]
    models = {"Keras": small_mlp(keras.Model, "auto"), "tfloop": small_mlp(jit_compile="auto")}
    seeing = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: logs["loss"])
    calls = {
        "fit": lambda model: model.fit(x, y, batch_size=128, verbose=0, callbacks=[seeing]),
        "train_on_batch": lambda model: [model.train_on_batch(*batch) for _ in range(steps)],
        "test_on_batch": lambda model: [model.test_on_batch(*batch) for _ in range(steps)],
        "predict_on_batch": lambda model: [model.predict_on_batch(batch[0]) for _ in range(steps)],
    }
    times: dict[str, list] = {f"{who}, {name}": [] for name in calls for who in models}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            for who, model in models.items():
                before = time.perf_counter()
                call(model)
                times[f"{who}, {name}"].append((time.perf_counter() - before) / steps)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def spectral(rounds):
    """Seconds a step of a net of three convolutions at batch 64: plain, with Keras' layer, with tfloop's."""
    x, y = examples(1280, (28, 28, 1))
    wraps = {
        "plain": lambda layer: layer,
        "Keras' layer": keras.layers.SpectralNormalization,
        "tfloop's layer": tfloop.SpectralNormalization,
    }
    models = {name: convolutions(wrap) for name, wrap in wraps.items()}
    fits = {name: lambda m=model, **how: m.fit(x, y, batch_size=64, **how) for name, model in models.items()}
    return in_turns(fits, 20, rounds)


def examples(count, shape=(784,)):
    x = np.random.default_rng(0).normal(size=(count, *shape)).astype("float32")
    return x, np.random.default_rng(1).integers(0, 10, count)


def small_mlp(kind=tfloop.Model, jit_compile="loop"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((784,))
    return compiled(kind(inputs, layers.Dense(10)(layers.Dense(100, activation="relu")(inputs))), jit_compile)


def convolutions(wrap):
    keras.utils.set_random_seed(0)
    h = inputs = keras.Input((28, 28, 1))
    for filters, stride in ((32, 1), (64, 2), (64, 1)):
        h = wrap(layers.Conv2D(filters, 3, stride, activation="relu"))(h)
    return compiled(tfloop.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(h))), False)


def compiled(model, jit_compile):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=jit_compile)
    return model


def in_turns(trains, steps, rounds):
    """`name -> median seconds a step`, one epoch of each in its turn; the first of each fit is left out."""
    times = {name: [] for name in trains}
    for _ in range(rounds + 1):
        for name, train in trains.items():
            timer = Epochs(3)
            train(epochs=1000, verbose=0, callbacks=[timer])
            times[name].append((timer.ends[-1] - timer.ends[0]) / (len(timer.ends) - 1) / steps)
    return {name: statistics.median(values[1:]) for name, values in times.items()}
