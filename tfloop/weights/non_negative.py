"""Non-negative: weights that are greater than zero."""

import keras
import numpy as np
import tensorflow as tf

from tfloop.weights.parametrization import Parametrization


@keras.saving.register_keras_serializable("tfloop")
class NonNegative(Parametrization):
    """W = softplus(raw) = log(1 + exp(raw)).

    When attached the raw weight becomes the inverse of the weight, so that W starts as what it was. A weight
    that is not positive starts at 0.01, where the gradient is alive.

    ```python
    layer = tfloop.Parametrized(layers.Dense(2), {"kernel": tfloop.NonNegative()})
    layer.build((None, 3))
    assert np.min(layer.effective_weights()["kernel"]) > 0
    ```
    """

    def call(self, raw, training=False):
        return tf.nn.softplus(raw)

    def start(self, weight):
        target = np.where(weight > 0, weight, 0.01).astype("float64")
        return (target + np.log(-np.expm1(-target))).astype(weight.dtype), {}
