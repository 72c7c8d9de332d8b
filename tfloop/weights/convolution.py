"""A convolution as an operator on inputs of one size, for its exact norm.

The operator's matrix has a row for each output pixel and a column for each input pixel, zeros at the
border included. It is never made: power iteration needs the convolution and its adjoint only. Tsuzuku et
al. 2018 (arXiv:1802.04034); for circular convolutions Sedghi et al. 2019 (arXiv:1805.10408).
"""

import keras
import tensorflow as tf
from keras import layers, ops

from tfloop.weights.matrix import TRANSPOSED, is_depthwise

SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
PLAIN = (layers.Conv1D, layers.Conv2D, layers.Conv3D)


class Convolution:
    """What a convolutional layer's kernel does to one input, without bias and activation.

    `forward(w, u)` is the layer's convolution of `u`, an input of one example; `adjoint(w, v)` is its
    adjoint, taken by differentiation, which holds for strides, paddings, dilations and groups alike.
    """

    def __init__(self, layer, variable, input_size=None):
        self._apply = application(layer, variable)
        self.state_shape = (1, *input_shape(layer, input_size))

    def forward(self, weight, u):
        return self._apply(u, weight)

    @tf.function  # in a graph also where a tape cannot record, as while a model is built
    def adjoint(self, weight, v):
        u = tf.zeros(self.state_shape, v.dtype)
        (result,) = tf.gradients(self._apply(u, weight), u, grad_ys=v)
        return result


def application(layer, variable):
    """The function `(x, kernel) -> y` that the layer applies; `None` for a weight that is not convolved."""
    common = {"strides": layer.strides, "data_format": layer.data_format, "dilation_rate": layer.dilation_rate}
    if is_depthwise(layer) or (isinstance(layer, SEPARABLE) and variable.name == "depthwise_kernel"):
        return lambda x, w: ops.depthwise_conv(x, w, padding=layer.padding, **common)
    if isinstance(layer, TRANSPOSED):
        return lambda x, w: ops.conv_transpose(
            x, w, padding=layer.padding, output_padding=layer.output_padding, **common
        )
    if layer.padding == "causal":
        return lambda x, w: ops.conv(padded_before(layer, x), w, padding="valid", **common)
    return lambda x, w: ops.conv(x, w, padding=layer.padding, **common)


def is_convolved(layer, variable):
    """Whether this weight is the kernel of a convolution with a window (that of a pointwise one is a matrix)."""
    names = {"depthwise_kernel"} if isinstance(layer, SEPARABLE) else {"kernel"}
    return (isinstance(layer, PLAIN + TRANSPOSED + SEPARABLE) or is_depthwise(layer)) and variable.name in names


def padded_before(layer, x):
    before = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
    time = 1 if layer.data_format == "channels_last" else 2
    return ops.pad(x, [[before, 0] if axis == time else [0, 0] for axis in range(3)])


def input_shape(layer, input_size):
    """The shape of one input without the batch, from what the layer was built for or from `input_size`."""
    built_for = (layer.get_build_config() or {}).get("input_shape")
    shape = list(built_for[1:])
    space = slice(0, -1) if layer.data_format == "channels_last" else slice(1, None)
    if input_size is not None:
        size = [input_size] if isinstance(input_size, int) else list(input_size)
        if len(size) != len(shape) - 1:
            raise ValueError(f"input_size={input_size} has not {len(shape) - 1} entries, as {layer.name!r} needs.")
        shape[space] = size
    if None in shape:
        raise ValueError(
            f"exact_conv=True needs the size of the inputs of {layer.name!r}, which was built for {built_for}: "
            "give SpectralNorm(exact_conv=True, input_size=...), the size without batch and channels."
        )
    return keras.tree.map_structure(int, shape)
