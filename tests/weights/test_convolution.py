"""The exact norm of a convolution against the SVD of its explicit matrix."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfloop import weights

CONVOLUTIONS = {
    "conv2d": (lambda: layers.Conv2D(3, 3), (6, 5, 2)),
    "same": (lambda: layers.Conv2D(3, 3, padding="same"), (5, 5, 2)),
    "strided": (lambda: layers.Conv2D(3, 3, strides=2, padding="same"), (6, 5, 2)),
    "strided, valid": (lambda: layers.Conv2D(2, (3, 2), strides=(2, 1)), (7, 5, 2)),
    "dilated": (lambda: layers.Conv2D(2, 3, dilation_rate=2, padding="same"), (6, 6, 2)),
    "grouped": (lambda: layers.Conv2D(4, 3, groups=2, padding="same"), (4, 4, 4)),
    "one": (lambda: layers.Conv1D(3, 4, padding="same"), (9, 2)),
    "causal": (lambda: layers.Conv1D(3, 3, padding="causal", dilation_rate=2), (8, 2)),
    "three": (lambda: layers.Conv3D(2, 2, padding="same"), (3, 3, 3, 2)),
    "transposed": (lambda: layers.Conv2DTranspose(3, 3), (4, 4, 2)),
    "transposed, strided": (
        lambda: layers.Conv2DTranspose(2, 3, strides=2, padding="same"),
        (4, 3, 2),
    ),
    "transposed, one": (lambda: layers.Conv1DTranspose(2, 3, strides=2, padding="valid"), (4, 2)),
    "depthwise": (lambda: layers.DepthwiseConv2D(3, padding="same"), (5, 5, 3)),
    "depthwise, strided": (
        lambda: layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2),
        (7, 7, 2),
    ),
    "depthwise, one": (lambda: layers.DepthwiseConv1D(3), (8, 3)),
}


def explicit_norm(layer, shape):
    """The largest singular value of the matrix whose columns are the layer's outputs for unit inputs."""
    size = int(np.prod(shape))
    columns = layer(np.eye(size, dtype="float32").reshape(size, *shape)).numpy()
    return np.linalg.svd(columns.reshape(size, -1), compute_uv=False)[0]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_operator_has_norm_one(kind):
    make, shape = CONVOLUTIONS[kind]
    layer = make()
    layer.build((None, *shape))
    layer.kernel.assign(np.random.default_rng(0).standard_normal(layer.kernel.shape))
    before = explicit_norm(layer, shape)
    layer = weights.Parametrized(layer, {"kernel": weights.SpectralNorm(exact_conv=True)})
    assert before > 1.1
    np.testing.assert_allclose(explicit_norm(layer, shape), 1.0, rtol=5e-3)


def test_the_norm_of_the_reshaped_kernel_is_another():
    shape = (6, 6, 2)
    plain = layers.Conv2D(3, 3, padding="same", kernel_initializer="ones")
    layer = weights.SpectralNormalization(plain)
    layer.build((None, *shape))
    assert explicit_norm(layer, shape) > 1.5


def test_both_kernels_of_a_separable_convolution():
    keras.utils.set_random_seed(0)
    layer = weights.Parametrized(
        layers.SeparableConv2D(4, 3, strides=2), {"*wise_kernel": weights.SpectralNorm(exact_conv=True)}
    )
    layer.build((None, 7, 7, 2))
    effective = layer.effective_weights()
    depthwise = layers.DepthwiseConv2D(3, strides=2)
    depthwise.build((None, 7, 7, 2))
    depthwise.kernel.assign(effective["depthwise_kernel"])
    np.testing.assert_allclose(explicit_norm(depthwise, (7, 7, 2)), 1.0, rtol=5e-3)
    pointwise = effective["pointwise_kernel"].numpy().reshape(2, 4)
    np.testing.assert_allclose(np.linalg.norm(pointwise, 2), 1.0, rtol=5e-3)


def test_it_follows_in_training_and_its_gradient_is_orthogonal():
    keras.utils.set_random_seed(0)
    layer = weights.Parametrized(
        layers.Conv2D(3, 3, padding="same"), {"kernel": weights.SpectralNorm(exact_conv=True, iterations=2)}
    )
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 2)).astype("float32")
    layer.build(x.shape)
    kernel = layer.layer.kernel

    @tf.function(jit_compile=True)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(layer(x, training=True) - 1.0))
        gradient = tape.gradient(loss, kernel.value)
        kernel.assign_sub(0.02 * gradient / tf.norm(gradient))
        return tf.reduce_sum(gradient * kernel) / tf.norm(gradient) / tf.norm(kernel.value)

    assert abs(step()) < 0.02  # of the kernel after the update
    for _ in range(20):
        step()
    np.testing.assert_allclose(explicit_norm(layer, (6, 6, 2)), 1.0 + layer_bias(layer), rtol=2e-2)


def layer_bias(layer):
    assert not layer.layer.bias.numpy().any()
    return 0.0


def test_an_unknown_input_size_must_be_given():
    def layer(**kwargs):
        made = weights.Parametrized(layers.Conv2D(3, 3), {"kernel": weights.SpectralNorm(exact_conv=True, **kwargs)})
        made.build((None, None, None, 2))
        return made

    with pytest.raises(ValueError, match="input_size"):
        layer()
    with pytest.raises(ValueError, match="has not 2 entries"):
        layer(input_size=5)
    np.testing.assert_allclose(explicit_norm(layer(input_size=(6, 5)), (6, 5, 2)), 1.0, rtol=5e-3)


def test_only_convolutions_have_it():
    layer = weights.Parametrized(layers.Dense(3), {"kernel": weights.SpectralNorm(exact_conv=True)})
    with pytest.raises(ValueError, match="not the kernel of a convolution"):
        layer.build((None, 2))
