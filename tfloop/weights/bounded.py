"""Bounded: weights between two limits."""

import keras
import numpy as np
import tensorflow as tf

from tfloop.weights.parametrization import Parametrization


@keras.saving.register_keras_serializable("tfloop")
class Bounded(Parametrization):
    """W = low + (high - low) * sigmoid(raw).

    When attached the raw weight becomes the inverse of the weight, so that W starts as what it was. A weight
    that is not between the limits starts 1 % of the range inside them, where the gradient is alive.

    Args:
        low, high: floats, low < high.

    ```python
    layer = tfloop.Parametrized(layers.Dense(2), {"kernel": tfloop.Bounded(-1.0, 1.0)})
    layer.build((None, 30))
    assert np.abs(layer.effective_weights()["kernel"]).max() <= 1.0
    ```
    """

    def __init__(self, low, high):
        super().__init__()
        if not low < high:
            raise ValueError(f"Bounded(low={low!r}, high={high!r}): low must be less than high.")
        self.low = low
        self.high = high

    def call(self, raw, training=False):
        return self.low + (self.high - self.low) * tf.sigmoid(raw)

    def start(self, weight):
        share = (weight.astype("float64") - self.low) / (self.high - self.low)
        share = np.where((share > 0) & (share < 1), share, np.clip(share, 0.01, 0.99))
        return (np.log(share) - np.log1p(-share)).astype(weight.dtype), {}

    def get_config(self):
        return {"low": self.low, "high": self.high}
