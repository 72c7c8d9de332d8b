"""A training binary without random layers, whose numbers do not depend on how many replicas share its batches.

66 examples in batches of 16: an epoch ends with a batch of two.

    devices=n   the process has n logical devices
    pause=s     every epoch takes s seconds longer
    fail=n      the process of this number in TF_CONFIG raises an error after its first epoch
"""

import json
import os
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app
from keras import layers, ops

import tfloop

KNOBS = json.loads(os.environ.get("KNOBS", "{}"))


def define():
    app.call_after_init(devices)
    tfloop.binary.define_flags(
        epochs=6, batch_size=16, progress="none", log="", checkpoint_every="4", learning_rate=0.01
    )


def devices():
    if "devices" in KNOBS:
        device = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * KNOBS["devices"])


class Pause(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        time.sleep(KNOBS.get("pause", 0))
        if "fail" in KNOBS and json.loads(os.environ["TF_CONFIG"])["task"]["index"] == KNOBS["fail"]:
            raise RuntimeError("this worker failed")


def main(argv):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(66, 6)).astype("float32")
    y = (x[:, 0] > 0).astype("int32") + (x[:, 1] > 0.5)
    inputs = keras.Input((6,))
    hidden = tfloop.SpectralNormalization(layers.Dense(8, activation="relu"))(inputs)
    hidden = layers.BatchNormalization(synchronized=True)(hidden)
    model = tfloop.Model(inputs, layers.Dense(3)(hidden))
    model.add_loss(lambda t: 0.1 * ops.mean(t["dense_1"] ** 2), name="small")
    model.watch("gradients/*", "norm")
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(tfloop.binary.FLAGS.learning_rate, 60),
            use_ema=True,
            ema_overwrite_frequency=7,
            global_clipnorm=0.5,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    average = tfloop.WeightAverage("ema", start=3, every=2, decay=0.9)
    tfloop.binary.train(model, x, y, validation_data=(x[:10], y[:10]), callbacks=[average, Pause()])
    print("fingerprint", tfloop.fingerprint(model))


if __name__ == "__main__":
    define()
    app.run(main)
