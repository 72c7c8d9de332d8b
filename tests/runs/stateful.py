"""A training binary of a model that holds everything stateful, for the tests of resuming.

python stateful.py --workdir=... --epochs=4 --batch_size=16 [--poison=17] [--pause=0.02] [--forget=dropout/]

96 + 4 examples in batches of 16: an epoch ends with a smaller batch. `--poison=i` makes example i not finite,
`--pause` sleeps so many seconds every step, `--forget` leaves variables out of the checkpoints.
"""

import os
import time

import keras
import numpy as np
from absl import app, flags
from keras import layers, ops

import tfloop
from tfloop import reproducibility

FLAGS = flags.FLAGS


def define():
    tfloop.binary.define_flags(epochs=4, batch_size=16, progress="none", log="", checkpoint_every="3")
    flags.DEFINE_integer("poison", -1, "Example that is not finite.")
    flags.DEFINE_float("pause", 0.0, "Seconds that every step takes longer.")
    flags.DEFINE_string("forget", "", "Prefix of the tensors that checkpoints leave out.")
    flags.DEFINE_integer("fail", -1, "Update in which the step raises an error.")


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


class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(FLAGS.pause)
        if FLAGS.fail >= 0 and int(self.model.optimizer.iterations) == FLAGS.fail:
            raise RuntimeError("the callback failed")


def data():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(100, 6, 6, 1)).astype("float32")
    y = (x.mean((1, 2, 3)) > 0).astype("int32") + (x[:, 0, 0, 0] > 1)
    if FLAGS.poison >= 0:
        x[FLAGS.poison] = np.nan
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
    if FLAGS.pause or FLAGS.fail >= 0:
        callbacks.append(Slow())
    if FLAGS.forget:
        forget(FLAGS.forget)
    tfloop.binary.train(model, x, y, validation_data=(x[:20], y[:20]), callbacks=callbacks)


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
