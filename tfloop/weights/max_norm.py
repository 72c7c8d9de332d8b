"""Max norm: no norm above a limit."""

import keras
import tensorflow as tf

from tfloop.weights.parametrization import Parametrization, divided, norm, reduced


@keras.saving.register_keras_serializable("tfloop")
class MaxNorm(Parametrization):
    """W = raw * min(1, limit / |raw|), the norm taken over `axis`.

    Args:
        limit: float above 0.
        axis: int, tuple or `None` (all), the axes reduced, as in `keras.constraints.MaxNorm`.

    ```python
    layer = tfloop.Parametrized(layers.Dense(2), {"kernel": tfloop.MaxNorm(0.5)})
    layer.build((None, 30))
    assert np.linalg.norm(layer.effective_weights()["kernel"], axis=0).max() <= 0.5 + 1e-6
    ```
    """

    def __init__(self, limit, axis=0):
        super().__init__()
        if not limit > 0:
            raise ValueError(f"MaxNorm(limit={limit!r}): the limit must be greater than 0.")
        self.limit = limit
        self.axis = axis

    def build(self, shape):
        reduced(shape, self.axis)

    def call(self, raw, training=False):
        length = norm(raw, reduced(raw.shape, self.axis))
        return tf.where(length > self.limit, self.limit * divided(raw, length), raw)

    def get_config(self):
        return {"limit": self.limit, "axis": self.axis}
