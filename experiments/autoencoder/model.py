"""An autoencoder with its loss on tensors: no targets, no loss in `compile`."""

import math

import keras
from keras import layers, ops

import tfloop


def build(image_shape=(8, 8, 1), hidden=100, code=16):
    """Images (n, height, width, channels) in 0 .. 1 to their reconstructions, through `code` numbers."""
    images = keras.Input(image_shape, name="images")
    x = layers.Flatten(name="pixels")(images)
    x = layers.Dense(hidden, activation="relu", name="encoder")(x)
    z = layers.Dense(code, dtype="float32", name="code")(x)
    x = layers.Dense(hidden, activation="relu", name="decoder")(z)
    x = layers.Dense(math.prod(image_shape), activation="sigmoid", dtype="float32", name="reconstructed_pixels")(x)
    reconstructions = layers.Reshape(image_shape, name="reconstructions")(x)

    model = tfloop.Model(images, reconstructions)
    model.add_loss(ops.mean((reconstructions - images) ** 2))
    model.add_metric(ops.mean(ops.sum(z**2, 1)), name="code_norm")
    return model
