"""A weight as a matrix: which of its axes lead in, which lead out.

Dense and convolution: everything x output axis. Transposed convolution: its output axis is the last but
one. EinsumDense: the axes of the equation, summed ones in, those of the output out, and those that run
along in both (a matrix for each index) as blocks. Depthwise: a block a channel. Gamma: a diagonal, which is
a block an entry. What is not known here: everything x last axis.
"""

import dataclasses
import math

import keras
import tensorflow as tf

TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The weight of a shape seen as `blocks` matrices of `rows` (in) x `columns` (out).

    `forward(w, u)` is M u and `adjoint(w, v)` is M' v in each block; `u` is of shape `(blocks, columns)`.
    """

    shape: tuple
    blocks: tuple
    rows: tuple
    columns: tuple

    @property
    def size(self):
        return tuple(math.prod(self.shape[a] for a in axes) for axes in self._axes)

    @property
    def state_shape(self):
        return self.size[0], self.size[2]

    @property
    def _axes(self):
        return self.blocks, self.rows, self.columns

    @property
    def _order(self):
        return [*self.blocks, *self.rows, *self.columns]

    def of(self, weight):
        """Weight -> tensor `(blocks, rows, columns)`."""
        if self._order != sorted(self._order):
            weight = tf.transpose(weight, self._order)
        return tf.reshape(weight, self.size)

    def back(self, matrices):
        """Tensor `(blocks, rows, columns)` -> weight."""
        weight = tf.reshape(matrices, [self.shape[a] for a in self._order])
        if self._order != sorted(self._order):
            weight = tf.transpose(weight, [self._order.index(a) for a in range(len(self.shape))])
        return weight

    def forward(self, weight, u):
        matrices = self.of(weight)
        if matrices.shape[0] == 1:  # a product of two matrices is faster than that of two batches of one
            return tf.matmul(u, matrices[0], transpose_b=True)
        return tf.linalg.matvec(matrices, u)

    def adjoint(self, weight, v):
        matrices = self.of(weight)
        if matrices.shape[0] == 1:
            return tf.matmul(v, matrices[0])
        return tf.linalg.matvec(matrices, v, transpose_a=True)


def matrix_of(shape, output_axis):
    """Everything x the output axis (an int or a tuple of them)."""
    rank = len(shape)
    given = (output_axis,) if isinstance(output_axis, int) else tuple(output_axis)
    if any(not -rank <= a < rank for a in given):
        raise ValueError(f"output_axis={output_axis} does not fit a weight of shape {tuple(shape)}.")
    columns = tuple(a % rank for a in given)
    return Matrix(tuple(shape), (), tuple(a for a in range(rank) if a not in columns), columns)


def matrix_in(layer, variable):
    """The matrix of one weight of one layer."""
    shape, name = tuple(variable.shape), variable.name
    every = tuple(range(len(shape)))
    if name == "gamma":
        return Matrix(shape, every, (), ())
    if name == "depthwise_kernel" or (is_depthwise(layer) and name == "kernel"):
        *window, channel, multiplier = every
        return Matrix(shape, (channel,), tuple(window), (multiplier,))
    if isinstance(layer, TRANSPOSED) and name == "kernel":
        return matrix_of(shape, -2)
    if isinstance(layer, keras.layers.EinsumDense) and name == "kernel":
        return matrix_in_equation(shape, layer.equation)
    return matrix_of(shape, -1)


def matrix_in_equation(shape, equation):
    """The matrix of the kernel of an `EinsumDense`, such as `"abc,cde->abde"`."""
    inputs, kernel, output = equation.replace(" ", "").replace("->", ",").split(",")
    blocks = tuple(a for a, axis in enumerate(kernel) if axis in inputs and axis in output)
    columns = tuple(a for a, axis in enumerate(kernel) if axis not in inputs and axis in output)
    rows = tuple(a for a, axis in enumerate(kernel) if axis not in output)
    return Matrix(shape, blocks, rows, columns)


def is_depthwise(layer):
    return isinstance(layer, keras.layers.DepthwiseConv1D | keras.layers.DepthwiseConv2D)
