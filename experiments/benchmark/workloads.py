"""Workloads: a model, its data and how it is compiled, the same for every rival.

`build(base)` makes the model as a subclass or functional instance of `base`, which is `keras.Model` or
`tfloop.Model`. Data are random: only their shapes matter here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

import tfloop


@dataclasses.dataclass(frozen=True)
class Workload:
    """`target`: the most that tfloop may take of Keras' `fit` as it comes. `arithmetic`: nearly all of it is."""

    name: str
    build: Callable[[type], keras.Model]
    data: Callable[[], tuple]
    batch_size: int
    compiled: Callable[[], dict[str, Any]]
    target: float
    arithmetic: bool = False
    stream: Callable[[tuple, int], Any] | None = None  # how `fit` gets the data, if not as arrays
    loops: tuple[str, ...] = ("scan", "jit", "graph")  # the hand-written loops worth trying

    def steps(self, data):
        """Steps an epoch."""
        return len(data[0]) // self.batch_size

    def feed(self, data):
        """The arguments of `fit` for the data."""
        if self.stream is not None:
            return {"x": self.stream(data, self.batch_size), "steps_per_epoch": self.steps(data)}
        return {"x": data[0], "y": data[1] if len(data) > 1 else None, "batch_size": self.batch_size}


def adam_crossentropy():
    return {"optimizer": keras.optimizers.Adam(), "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}


def adam_alone():
    return {"optimizer": keras.optimizers.Adam(), "loss": None}


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def classes(count, size, shape=()):
    return np.random.default_rng(1).integers(0, count, (size, *shape)).astype("int32")


def functional(layer_list, shape, dtype=None):
    def build(base):
        x = inputs = keras.Input(shape, dtype=dtype)
        for layer in layer_list():
            x = layer(x)
        return base(inputs, x)

    return build


def mlp(*widths):
    return lambda: [*(layers.Dense(w, activation="relu") for w in widths), layers.Dense(10)]


def convolutions():
    made = []
    for filters in (16, 32):
        made += [layers.Conv2D(filters, 3, padding="same", use_bias=False), layers.BatchNormalization()]
        made += [layers.ReLU(), layers.MaxPooling2D()]
    return [*made, layers.Flatten(), layers.Dense(10)]


def residual(base):
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(16, 3, padding="same")(inputs)
    for filters, stride in ((16, 1), (32, 2), (64, 2)):
        y = layers.BatchNormalization()(layers.Conv2D(filters, 3, stride, "same", use_bias=False)(x))
        y = layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same", use_bias=False)(ops.relu(y)))
        x = x if x.shape[-1] == filters else layers.Conv2D(filters, 1, stride)(x)
        x = ops.relu(layers.Add()([x, y]))
    return base(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def transformer(base, vocabulary=1000, length=64, width=64, depth=2):
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(vocabulary, width)(inputs) + layers.Embedding(length, width)(ops.arange(length))
    for _ in range(depth):
        h = layers.LayerNormalization()(x)
        x = x + layers.Dropout(0.1)(layers.MultiHeadAttention(4, width // 4, dropout=0.1)(h, h))
        h = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dropout(0.1)(layers.Dense(width)(h))
    return base(inputs, layers.Dense(vocabulary)(layers.LayerNormalization()(x)))


def gan(base):
    """A GAN with spectral norm in the discriminator; two optimizers in one step, written for any Keras."""

    class GAN(base):  # type: ignore[valid-type, misc]
        def __init__(self):
            super().__init__()
            self.generator = keras.Sequential([layers.Dense(128, activation="relu"), layers.Dense(784)])
            normalised = tfloop.SpectralNormalization
            self.discriminator = keras.Sequential(
                [normalised(layers.Dense(128, activation="leaky_relu")), normalised(layers.Dense(1))]
            )
            self.generator_optimizer = keras.optimizers.Adam(2e-4)
            self.discriminator_optimizer = keras.optimizers.Adam(2e-4)
            self.draws = keras.random.SeedGenerator(0)
            self.generator.build((None, 32))
            self.discriminator.build((None, 784))
            for optimizer, net in self.pairs():
                optimizer.build(net.trainable_variables)

        def pairs(self):
            yield self.discriminator_optimizer, self.discriminator
            yield self.generator_optimizer, self.generator

        def call(self, x):
            return self.discriminator(x)

        def train_step(self, data):
            real = keras.utils.unpack_x_y_sample_weight(data)[0]
            z = keras.random.normal((128, 32), seed=self.draws)
            fake = self.generator(z, training=True)
            with tf.GradientTape() as tape:
                scores = self.discriminator(ops.concatenate([real, fake]), training=True)
                d_loss = ops.mean(ops.softplus(-scores[:128])) + ops.mean(ops.softplus(scores[128:]))
            self.update(tape, d_loss, self.discriminator_optimizer, self.discriminator)
            with tf.GradientTape() as tape:
                scores = self.discriminator(self.generator(z, training=True), training=True)
                g_loss = ops.mean(ops.softplus(-scores))
            self.update(tape, g_loss, self.generator_optimizer, self.generator)
            return {"d_loss": d_loss, "g_loss": g_loss}

        def update(self, tape, loss, optimizer, net):
            variables = net.trainable_variables
            optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

    return GAN()


class Sampling(layers.Layer):
    """Draws from the posterior, and adds its distance from the prior to the losses."""

    def __init__(self):
        super().__init__()
        self.draws = keras.random.SeedGenerator(0)

    def call(self, inputs):
        mean, log_var = inputs
        kl = -0.5 * ops.mean(ops.sum(1 + log_var - ops.square(mean) - ops.exp(log_var), -1))
        self.add_loss(1e-3 * kl)
        return mean + ops.exp(0.5 * log_var) * keras.random.normal(ops.shape(mean), seed=self.draws)


def vae(base):
    inputs = keras.Input((784,))
    h = layers.Dense(256, activation="relu")(inputs)
    z = Sampling()([layers.Dense(16)(h), layers.Dense(16)(h)])
    return base(inputs, layers.Dense(784, activation="sigmoid")(layers.Dense(256, activation="relu")(z)))


def scaled(data, batch_size):
    x, y = data
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size, drop_remainder=True)
    return dataset.map(lambda a, b: (a * 0.5 + 0.1, b), num_parallel_calls=tf.data.AUTOTUNE).repeat().prefetch(2)


class Batches:
    """Batches made by Python, one at a time; a generator for every epoch."""

    def __init__(self, data, batch_size):
        self.data, self.batch_size = data, batch_size

    def __len__(self):
        return len(self.data[0]) // self.batch_size

    def __iter__(self):
        while True:
            for start in range(0, len(self) * self.batch_size, self.batch_size):
                yield tuple(part[start : start + self.batch_size] for part in self.data)


def generator(data, batch_size):
    return iter(Batches(data, batch_size))


def embedding():
    return [layers.Embedding(50_000, 64), layers.GlobalAveragePooling1D(), layers.Dense(10)]


def sgd_crossentropy():
    return {**adam_crossentropy(), "optimizer": keras.optimizers.SGD(0.1)}


def images(count, side, channels):
    return lambda: (normal(count, side, side, channels), classes(10, count))


def vectors(count, width):
    return lambda: (normal(count, width), classes(10, count))


def ids(count, length, vocabulary):
    return lambda: (classes(vocabulary, count, (length,)), classes(10, count))


WORKLOADS = {
    w.name: w
    for w in (
        Workload("tabular", functional(mlp(64, 64), (20,)), vectors(32_000, 20), 32, adam_crossentropy, 0.10),
        Workload("small_mlp", functional(mlp(100), (784,)), vectors(51_200, 784), 128, adam_crossentropy, 0.25),
        Workload(
            "large_mlp", functional(mlp(1024, 1024), (784,)), vectors(2560, 784), 128, adam_crossentropy, 0.70, True
        ),
        Workload(
            "convolutions",
            functional(convolutions, (28, 28, 1)),
            images(1280, 28, 1),
            64,
            adam_crossentropy,
            0.85,
            True,
            loops=("jit", "graph", "unrolled"),
        ),
        Workload(
            "residual",
            residual,
            images(1280, 16, 3),
            64,
            adam_crossentropy,
            0.85,
            True,
            loops=("jit", "graph", "unrolled"),
        ),
        Workload(
            "transformer",
            transformer,
            lambda: (classes(1000, 640, (64,)), classes(1000, 640, (64,))),
            32,
            adam_crossentropy,
            0.85,
            True,
        ),
        Workload(
            "lstm",
            functional(lambda: [layers.LSTM(64), layers.Dense(10)], (28, 28)),
            lambda: (normal(2560, 28, 28), classes(10, 2560)),
            64,
            adam_crossentropy,
            0.85,
            True,
        ),
        Workload("gan", gan, lambda: (normal(6400, 784),), 128, adam_alone, 0.70),
        Workload(
            "embedding_sgd",
            functional(embedding, (20,), "int32"),
            ids(25_600, 20, 50_000),
            64,
            sgd_crossentropy,
            0.25,
        ),
        Workload(
            "embedding",
            functional(embedding, (20,), "int32"),
            ids(640, 20, 50_000),
            64,
            adam_crossentropy,
            0.85,
            True,
        ),
        Workload(
            "vae",
            vae,
            lambda: (normal(6400, 784), normal(6400, 784)),
            128,
            lambda: {"optimizer": keras.optimizers.Adam(), "loss": keras.losses.MeanSquaredError()},
            0.70,
        ),
        Workload(
            "tf_data",
            functional(mlp(100), (784,)),
            vectors(51_200, 784),
            128,
            adam_crossentropy,
            0.60,
            stream=scaled,
            loops=("streamed", "stacked_dataset"),
        ),
        Workload(
            "generator",
            functional(mlp(100), (784,)),
            vectors(51_200, 784),
            128,
            adam_crossentropy,
            0.60,
            stream=generator,
            loops=("stacked_batches",),
        ),
    )
}
