"""What parts of tfloop cost: a run on disk, its guard and its checkpoints; spectral norm on every kernel."""

import statistics
import tempfile

import keras
import numpy as np
from keras import layers

import tfloop
from experiments.benchmark.rivals import Epochs


def runs(rounds):
    """Seconds a step of the small MLP: `fit`, a run on disk, with the guard, with a checkpoint every 100 steps."""
    steps = 400
    kinds: dict[str, dict] = {
        "run": {},
        "run, guard": {"on_nan": "skip"},
        "run, checkpoints": {"checkpoint_every": 100},
    }
    x = np.random.default_rng(0).normal(size=(128 * steps, 784)).astype("float32")
    y = np.random.default_rng(1).integers(0, 10, len(x))
    models = {name: small_mlp() for name in ("fit", *kinds)}

    def train(name, **how):
        if name == "fit":
            models[name].fit(x, y, batch_size=128, **how)
            return
        options = {"checkpoint_every": 10**9, "on_nan": "ignore", "log": (), **kinds[name]}
        with tempfile.TemporaryDirectory() as folder:
            tfloop.Run(f"{folder}/run", **options).fit(models[name], x, y, batch_size=128, **how)

    return in_turns({name: lambda name=name, **how: train(name, **how) for name in models}, steps, rounds)


def spectral(rounds):
    """Seconds a step of a net of three convolutions at batch 64: plain, with Keras' layer, with tfloop's."""
    x = np.random.default_rng(0).normal(size=(1280, 28, 28, 1)).astype("float32")
    y = np.random.default_rng(1).integers(0, 10, len(x))
    wraps = {
        "plain": lambda layer: layer,
        "Keras' layer": keras.layers.SpectralNormalization,
        "tfloop's layer": tfloop.SpectralNormalization,
    }
    models = {name: convolutions(wrap) for name, wrap in wraps.items()}
    fits = {name: lambda m=model, **how: m.fit(x, y, batch_size=64, **how) for name, model in models.items()}
    return in_turns(fits, 20, rounds)


def small_mlp():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((784,))
    return compiled(tfloop.Model(inputs, layers.Dense(10)(layers.Dense(100, activation="relu")(inputs))), "loop")


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
