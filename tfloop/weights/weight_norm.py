"""Weight normalisation: length and direction of each output's weights apart."""

import keras
import numpy as np
import tensorflow as tf

from tfloop.weights.parametrization import Parametrization, divided, norm, reduced


@keras.saving.register_keras_serializable("tfloop")
class WeightNorm(Parametrization):
    """W = g * raw / |raw|, the norm taken over all axes but the output axis.

    Salimans and Kingma 2016, arXiv:1602.07868. State: `g`, trainable, of the shape of the output axes. It
    starts as |raw|, so that W starts as what the weight was.

    Args:
        output_axis: int or tuple, the axes with a norm for each index; `None`: one norm for the whole weight.

    ```python
    layer = tfloop.Parametrized(layers.Dense(2), {"kernel": tfloop.WeightNorm()})
    layer.build((None, 3))
    np.testing.assert_allclose(layer.effective_weights()["kernel"], layer.layer.kernel, rtol=1e-6)
    ```
    """

    def __init__(self, output_axis=-1):
        super().__init__()
        self.output_axis = output_axis
        self._axes = None

    def build(self, shape):
        kept = [] if self.output_axis is None else reduced(shape, self.output_axis)
        self._axes = [a for a in range(len(shape)) if a not in kept]
        self._broadcast = [1 if a in self._axes else size for a, size in enumerate(shape)]
        self.add_state("g", [shape[a] for a in kept], "ones", trainable=True)

    def call(self, raw, training=False):
        g = tf.reshape(tf.cast(self.g, raw.dtype), self._broadcast)
        return g * divided(raw, norm(raw, self._axes))

    def start(self, weight):
        squares = np.square(weight, dtype="float64")
        return weight, {"g": np.sqrt(np.sum(squares, axis=tuple(self._axes)))}

    def get_config(self):
        return {"output_axis": self.output_axis}
