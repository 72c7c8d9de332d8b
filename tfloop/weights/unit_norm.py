"""Unit norm: `x * unit_norm(W)` rather than `x * W`."""

import keras

from tfloop.weights.parametrization import Parametrization, divided, norm, reduced


@keras.saving.register_keras_serializable("tfloop")
class UnitNorm(Parametrization):
    """W = raw / |raw|, the norm taken over `axis`; zero where the raw weights are zero.

    Args:
        axis: int, tuple or `None` (all), the axes reduced, as in `keras.constraints.UnitNorm`: 0 for a Dense
            kernel, `(0, 1, 2)` for that of a Conv2D.

    ```python
    layer = tfloop.Parametrized(layers.Dense(2), {"kernel": tfloop.UnitNorm()})
    layer.build((None, 3))
    effective = layer.effective_weights()["kernel"]
    np.testing.assert_allclose(np.linalg.norm(effective, axis=0), 1.0, rtol=1e-6)
    ```
    """

    def __init__(self, axis=0):
        super().__init__()
        self.axis = axis

    def build(self, shape):
        reduced(shape, self.axis)

    def call(self, raw, training=False):
        return divided(raw, norm(raw, reduced(raw.shape, self.axis)))

    def get_config(self):
        return {"axis": self.axis}
