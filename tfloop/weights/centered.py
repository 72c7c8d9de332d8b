"""Centred: weights of mean zero."""

import keras
import tensorflow as tf

from tfloop.weights.parametrization import Parametrization, reduced


@keras.saving.register_keras_serializable("tfloop")
class Centered(Parametrization):
    """W = raw - mean(raw), the mean taken over `axis`.

    Huang et al. 2017, "Centered Weight Normalization" (without its normalisation: `[Centered(), UnitNorm()]`).

    Args:
        axis: int, tuple or `None` (all), the axes reduced, as in Keras' constraints.

    ```python
    layer = tfloop.Parametrized(layers.Dense(2), {"kernel": [tfloop.Centered(), tfloop.UnitNorm()]})
    layer.build((None, 3))
    np.testing.assert_allclose(np.mean(layer.effective_weights()["kernel"], axis=0), 0.0, atol=1e-6)
    ```
    """

    def __init__(self, axis=0):
        super().__init__()
        self.axis = axis

    def build(self, shape):
        reduced(shape, self.axis)

    def call(self, raw, training=False):
        return raw - tf.reduce_mean(raw, reduced(raw.shape, self.axis), keepdims=True)

    def get_config(self):
        return {"axis": self.axis}
