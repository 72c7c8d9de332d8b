"""A small convolutional network with BatchNormalization, trained with a step size that stays high."""

import keras
from keras import layers

import tfloop


def build(image_shape, classes=10, width=16):
    """Images (n, height, width, channels) to logits (n, classes)."""
    x = images = keras.Input(image_shape, name="images")
    for i, strides in enumerate((1, 2, 2)):
        x = layers.Conv2D(width << i, 3, strides, padding="same", use_bias=False, name=f"conv_{i}")(x)
        x = layers.BatchNormalization(name=f"norm_{i}")(x)
        x = layers.ReLU(name=f"relu_{i}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return tfloop.Model(images, layers.Dense(classes, dtype="float32", name="logits")(x))
