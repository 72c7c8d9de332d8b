"""Orthogonal: a matrix with orthonormal columns, or rows where it is wide."""

import keras
import numpy as np
import tensorflow as tf

from tfloop.weights.matrix import matrix_in, matrix_of
from tfloop.weights.parametrization import Parametrization


@keras.saving.register_keras_serializable("tfloop")
class Orthogonal(Parametrization):
    """W'W = I (W W' = I if the matrix is wide), by the Cayley map.

    With raw = [U; V], U square: A = U - U' + V'V, B = (I + A)^-1 and W = [2 B - I; -2 V B] D. The
    symmetric part of A is not negative, so B exists and the map is differentiable for every raw weight;
    no step leaves the orthogonal matrices, to 1e-5 (5e-4 where a GPU multiplies in TF32). Trockman and
    Kolter 2021, arXiv:2104.07167, section 4; the signs D make each matrix reachable (Helfrich et al.
    2018, arXiv:1707.09520, where they are called scaling).

    It starts from the orthogonal matrix that is nearest to the weight (its polar factor), so a weight that is
    orthogonal stays as it is: the raw weight becomes the inverse of it. The matrix of a kernel is that of
    `SpectralNorm`; depthwise kernels are orthogonal in each channel. Solving costs about the cube of the
    smaller side.

    State: `signs`, (blocks, smaller side) of 1 and -1, set when attached and then constant.

    ```python
    layer = tfloop.Parametrized(layers.Dense(3), {"kernel": tfloop.Orthogonal()})
    layer.build((None, 5))
    w = layer.effective_weights()["kernel"].numpy()
    np.testing.assert_allclose(w.T @ w, np.eye(3), atol=1e-5)
    ```
    """

    def __init__(self):
        super().__init__()
        self._matrix = None

    def bind(self, layer, variable):
        self._matrix = matrix_in(layer, variable)

    def build(self, shape):
        if self._matrix is None:
            self._matrix = matrix_of(shape, -1)
        blocks, rows, columns = self._matrix.size
        self._wide = rows < columns
        self.add_state("signs", (blocks, min(rows, columns)), "ones")

    def call(self, raw, training=False):
        tall = tf.linalg.matrix_transpose(self._matrix.of(raw)) if self._wide else self._matrix.of(raw)
        tall = cayley(tall) * tf.cast(self.signs, raw.dtype)[:, tf.newaxis, :]
        return self._matrix.back(tf.linalg.matrix_transpose(tall) if self._wide else tall)

    def start(self, weight):
        matrices = self._matrix.of(weight).numpy().astype("float64")
        tall = matrices.swapaxes(1, 2) if self._wide else matrices
        found = [inverse_cayley(nearest_orthogonal(matrix)) for matrix in tall]
        raw = np.stack([r for _, r in found]).astype(weight.dtype)
        raw = raw.swapaxes(1, 2) if self._wide else raw
        return self._matrix.back(raw).numpy(), {"signs": np.stack([s for s, _ in found])}


def cayley(raw):
    """Tall matrices `(..., m, n)` -> matrices with orthonormal columns."""
    n = raw.shape[-1]
    top, below = raw[..., :n, :], raw[..., n:, :]
    one = tf.eye(n, dtype=raw.dtype)
    a = top - tf.linalg.matrix_transpose(top) + tf.linalg.matmul(below, below, transpose_a=True)
    b = tf.linalg.solve(one + a, tf.broadcast_to(one, tf.shape(a)))
    q = tf.concat([2 * b - one, -2 * below @ b], axis=-2)
    # One step of Newton and Schulz takes what float32 left of the error.
    return q @ (1.5 * one - 0.5 * tf.linalg.matmul(q, q, transpose_a=True))


def nearest_orthogonal(matrix):
    """The polar factor of a tall matrix."""
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def inverse_cayley(q):
    """Signs d and raw matrix with `cayley(raw) * d == q`, for a tall q with orthonormal columns."""
    n = q.shape[1]
    signs = well_conditioned_signs(q[:n])
    q = q * signs
    b = (np.eye(n) + q[:n]) / 2
    below = -q[n:] @ np.linalg.inv(b) / 2
    skew = np.linalg.inv(b) - np.eye(n) - below.T @ below
    return signs, np.concatenate([(skew - skew.T) / 4, below])


def well_conditioned_signs(top):
    """Signs d such that I + top * d can be inverted: each pivot of top + diag(d) becomes 1 at least."""
    rest = top.copy()
    signs = np.ones(len(top))
    for k in range(len(top)):
        signs[k] = 1.0 if rest[k, k] >= 0 else -1.0
        rest[k, k] += signs[k]
        rest[k + 1 :, k + 1 :] -= np.outer(rest[k + 1 :, k], rest[k, k + 1 :]) / rest[k, k]
    return signs
