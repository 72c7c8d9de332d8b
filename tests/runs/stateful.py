"""A training binary of a model that holds everything stateful, for the tests of resuming.

python stateful.py --workdir=...

100 examples in batches of 16: an epoch ends with a smaller batch. What happens to the process is in `KNOBS`, which
is no flag of it, set from the environment:

    poison=i    example i is not finite
    pause=s     every step takes s seconds longer
    pause_test=s    every validation does
    fail=n      a callback raises an error after n updates
    full=n      n writes of checkpoints fail for want of space
    forget=...  a resumed process leaves out the variables whose names hold this; or "position"
"""

import errno
import json
import os
import time

import keras
import numpy as np
from absl import app
from keras import layers, ops

import tfloop
from tfloop import reproducibility
from tfloop.runs import checkpoint_file

KNOBS = json.loads(os.environ.get("KNOBS", "{}"))


def define():
    tfloop.binary.define_flags(epochs=4, batch_size=16, progress="none", log="", checkpoint_every="3")


class Everything(tfloop.Model):
    def __init__(self):
        super().__init__()
        self.convolution = tfloop.SpectralNormalization(layers.Conv2D(4, 3, padding="same"))
        self.batch_norm = layers.BatchNormalization()
        self.dropout = layers.Dropout(0.3)
        self.noise = layers.GaussianNoise(0.1)
        self.flatten = layers.Flatten()
        self.logits = layers.Dense(3)

    def call(self, x, training=False):
        h = ops.relu(self.batch_norm(self.convolution(self.noise(x, training=training)), training=training))
        if training:
            h = h + 0.01 * keras.random.normal(ops.shape(h))  # from the process' own generator
        self.add_metric(ops.mean(h), name="activity")
        return self.logits(self.dropout(self.flatten(h), training=training))


class SlowTest(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
        time.sleep(KNOBS["pause_test"])


class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(KNOBS.get("pause", 0))
        if int(self.model.optimizer.iterations) == KNOBS.get("fail"):
            raise RuntimeError("the callback failed")


def data():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(100, 6, 6, 1)).astype("float32")
    y = (x.mean((1, 2, 3)) > 0).astype("int32") + (x[:, 0, 0, 0] > 1)
    if "poison" in KNOBS:
        x[KNOBS["poison"]] = np.nan
    return x, y


def main(argv):
    x, y = data()
    model = Everything()
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, 40)
    model.compile(
        keras.optimizers.AdamW(schedule, use_ema=True, ema_overwrite_frequency=5, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    callbacks = [
        tfloop.WeightAverage("ema", start=3, every=2, decay=0.9),
        keras.callbacks.EarlyStopping(patience=50, restore_best_weights=True, start_from_epoch=1),
    ]
    if "pause" in KNOBS or "fail" in KNOBS:
        callbacks.append(Slow())
    if "pause_test" in KNOBS:
        callbacks.append(SlowTest())
    if "forget" in KNOBS:
        forget(KNOBS["forget"])
    if "full" in KNOBS:
        fill_the_disk(KNOBS["full"])
    tfloop.binary.train(model, x, y, validation_data=(x[:16], y[:16]), callbacks=callbacks)


def fill_the_disk(times):
    """The disk is full while the checkpoint's tensors are written, so many times."""
    left, write = [times], checkpoint_file.write

    def failing(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)

    checkpoint_file.write = failing


def forget(prefix):
    """A fault on purpose: what is restored leaves out the tensors, or the part of the manifest, of a name."""
    if prefix == "position":
        from tfloop.runs.session import Session

        resume = Session._resume
        Session._resume = lambda self: type(found := resume(self))(found.epoch, 0, found.aggregate)
        return
    assign = reproducibility.assign

    def forgetful(variables, arrays):
        kept = {n: a for n, a in arrays.items() if prefix not in n}
        assert len(kept) < len(arrays), sorted(arrays)
        assign(variables, kept)

    reproducibility.assign = forgetful


if __name__ == "__main__":
    define()
    app.run(main)
