"""Spectral norm: the weight over its largest singular value."""

import keras
import tensorflow as tf

from tfloop.weights.convolution import Convolution, is_convolved
from tfloop.weights.matrix import matrix_in, matrix_of
from tfloop.weights.parametrization import Parametrization, divided
from tfloop.weights.power_iteration import first_vector, power_iteration, settled, sigma


@keras.saving.register_keras_serializable("tfloop")
class SpectralNorm(Parametrization):
    """W = norm * raw / sigma(raw), sigma the largest singular value, estimated by power iteration.

    Miyato et al. 2018, arXiv:1802.05957. Once a training step u <- M'v / |M'v| with v = M u / |M u|,
    `iterations` times; then sigma = v' M u. The gradient passes through sigma with u and v constant:
    dL/draw = norm * (G / s - <G, raw> / s**2 * v u'), G the gradient at W: orthogonal to the raw weight.

    Args:
        iterations: int, power iterations a training step.
        norm: float, the spectral norm that W gets.
        output_axis: int or tuple, the axes of the weight that lead out, everything else leads in. By default
            as the layer uses it: Dense, Conv, RNN, Embedding the last axis, transposed convolution the last
            but one, EinsumDense and attention by the equation; depthwise kernels are one block a channel and
            gamma is a diagonal, of which the largest counts.
        exact_conv: bool, the norm of the convolution as an operator on its inputs, by power iteration with
            the convolution itself, instead of that of the reshaped kernel. Costs about as much as the layer's
            forward and backward pass on one example.
        input_size: the size of these inputs without batch and channels, where the layer was built for an
            unknown one.

    State: `u`, float32 (float64 for such a weight), `(blocks, outputs)`, or `(1, *input)` with `exact_conv`.
    When built it is iterated until the estimate settles. After that the estimate follows the weight at
    `iterations` a step: within 1 % where the two largest singular values differ by some percent; where they
    are close, it lags (from below) until it has found the new largest: give more iterations then.

    A weight of zeros stays zero. Raises `ValueError` for `iterations` below 1, `norm` not above 0, an axis
    that does not fit, `exact_conv` on a weight that is not convolved or with an unknown input size.

    ```python
    layer = tfloop.Parametrized(layers.Dense(8), {"kernel": tfloop.SpectralNorm(norm=2.0)})
    layer.build((None, 5))
    effective = layer.effective_weights()["kernel"]
    np.testing.assert_allclose(np.linalg.norm(effective, 2), 2.0, rtol=1e-2)
    ```
    """

    def __init__(self, iterations=1, norm=1.0, output_axis=None, exact_conv=False, input_size=None):
        super().__init__()
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"SpectralNorm(iterations={iterations!r}): at least one iteration a step is needed.")
        if not norm > 0:
            raise ValueError(f"SpectralNorm(norm={norm!r}): the norm must be greater than 0.")
        if exact_conv and output_axis is not None:
            raise ValueError("SpectralNorm(exact_conv=True) has no output_axis: it takes the convolution as it is.")
        self.iterations = iterations
        self.norm = norm
        self.output_axis = output_axis
        self.exact_conv = exact_conv
        self.input_size = input_size
        self._operator = None

    def bind(self, layer, variable):
        if self.exact_conv and is_convolved(layer, variable):
            self._operator = Convolution(layer, variable, self.input_size)
        elif self.exact_conv and variable.name != "pointwise_kernel":
            raise ValueError(
                f"SpectralNorm(exact_conv=True) on {variable.name!r} of {layer.name!r}: this is not the kernel of a "
                "convolution."
            )
        elif self.output_axis is None:
            self._operator = matrix_in(layer, variable)

    def build(self, shape):
        if self._operator is None:
            self._operator = matrix_of(shape, -1 if self.output_axis is None else self.output_axis)
        self.add_state(
            "u",
            self._operator.state_shape,
            lambda shape, dtype: first_vector(shape, dtype),
        )

    def call(self, raw, training=False):
        if training is not False:
            self.once_a_step(lambda: self._move_u(raw, training))
        return divided(raw, sigma(self._operator, raw, self.u)) * self.norm

    def _move_u(self, raw, training):
        u = tf.convert_to_tensor(self.u)
        moved = power_iteration(self._operator, raw, u, self.iterations)
        self.u.assign(moved if training is True else tf.where(training, moved, u))

    def warm_start(self, raw):
        raw = tf.convert_to_tensor(raw)
        return {"u": settled(self._operator, raw, first_vector(self._operator.state_shape, raw.dtype))}

    def get_config(self):
        return {
            "iterations": self.iterations,
            "norm": self.norm,
            "output_axis": self.output_axis,
            "exact_conv": self.exact_conv,
            "input_size": self.input_size,
        }
