"""Small models and data for the tests of the loop."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfloop
from tfloop.loop.observer import Observer

ENGINES = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "jit": {"jit_compile": "step"},
    "scan": {"jit_compile": "loop"},
}


def data(examples=10, width=6, classes=3):
    random = np.random.default_rng(0)
    return random.normal(size=(examples, width)).astype("float32"), random.integers(0, classes, examples)


class Counting(tfloop.Model):
    """A classifier that counts how often Python runs its `call` in training."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.hidden = layers.Dense(8, activation="relu")
        self.dropout = layers.Dropout(dropout)
        self.logits = layers.Dense(3)
        self.calls = 0

    def call(self, x, training=None):
        self.calls += bool(training)
        return self.logits(self.dropout(self.hidden(x), training=training))


def compiled(model=None, optimizer=None, **options):
    model = model or Counting()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(0.01), loss, metrics=["accuracy"], **options)
    return model


def fresh(make=Counting, seed=1, **options):
    tfloop.set_seed(seed)
    return compiled(make(), **options)


class Seen(keras.callbacks.Callback):
    """Remembers the steps at which its hooks were called, and the logs."""

    def __init__(self):
        super().__init__()
        self.ends, self.logs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(batch)
        self.logs.append(dict(logs))


class Chunks(Observer):
    """Remembers how many steps each chunk had, and the positions; `most` bounds the chunks."""

    def __init__(self, most=None):
        super().__init__()
        self.lengths, self.records, self.most = [], [], most

    def limit(self, steps):
        return steps if self.most is None else min(steps, self.most)

    def on_chunk(self, record, feed):
        self.lengths.append(len(record))
        self.records.append(record)
        return record


def dataset(x, y, batch_size):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size)
