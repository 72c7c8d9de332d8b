"""A network of one hidden layer, whose norm is a metric."""

from keras import layers, ops

import tfloop


class Classifier(tfloop.Model):
    """Images (n, height, width, channels) to logits (n, classes)."""

    def __init__(self, units=100, classes=10):
        super().__init__()
        self.flatten = layers.Flatten()
        self.hidden = layers.Dense(units, activation="relu")
        self.logits = layers.Dense(classes)

    def call(self, images):
        hidden = self.hidden(self.flatten(images))
        self.add_metric(ops.mean(ops.norm(hidden, axis=-1)), name="hidden_norm")
        return self.logits(hidden)
