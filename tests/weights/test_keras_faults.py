"""What Keras' own SpectralNormalization does otherwise: each fact of it, and that ours does not.

The half about Keras is skipped once a later Keras mends it: it then says so.
"""

import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfloop import weights
from tfloop.step import Step, running

KINDS = {"keras": layers.SpectralNormalization, "tfloop": weights.SpectralNormalization}


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def built(kind, layer=None, inputs=4, **kwargs):
    layer = KINDS[kind](layer or layers.Dense(3, use_bias=False), **kwargs)
    layer.build((None, inputs))
    layer.layer.kernel.assign(3 * data(inputs, 3))
    return layer


def expect(fact, kind, message):
    """Asserts a fact of tfloop, and its opposite of Keras."""
    if kind == "keras" and fact:
        pytest.skip(f"this Keras has mended it: {message}")
    assert fact == (kind == "tfloop"), message


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_r1_the_gradient_passes_through_sigma(kind):
    layer, x = built(kind), data(5, 4)
    for _ in range(50):
        layer(x, training=True)  # u settles
    layer.layer.kernel.assign(3 * data(4, 3))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, training=True) ** 3)
    kernel = layer.layer.kernel
    gradient = tape.gradient(loss, layer.trainable_weights)[0].numpy()
    cosine = np.sum(gradient * kernel.numpy()) / np.linalg.norm(gradient) / np.linalg.norm(kernel.numpy())
    expect(abs(cosine) < 1e-4, kind, "the gradient is orthogonal to the weight")


def test_r2_inference_uses_the_normalised_weight(kind):
    layer = built(kind)
    weights.warm_start(layer)
    sigma = np.linalg.norm(layer(np.eye(4, dtype="float32"), training=False), 2)
    expect(abs(sigma - 1) < 0.01, kind, "sigma is 1 at inference")


def test_r3_a_frozen_weight_is_not_written(kind):
    layer = built(kind)
    layer.trainable = False
    before = layer.layer.kernel.numpy()
    layer(data(2, 4), training=True)
    expect(np.array_equal(layer.layer.kernel, before), kind, "the frozen weight stays")


def test_r4_one_kernel_for_all_calls_of_a_step(kind):
    layer, x = built(kind), np.eye(4, dtype="float32")
    with running(Step()):
        real, fake = layer(x, training=True).numpy(), layer(x, training=True).numpy()
    expect(np.array_equal(real, fake), kind, "D(real) and D(fake) use one kernel")


def test_r5_the_float32_master_is_not_rounded(kind):
    policy = "mixed_bfloat16"
    layer = built(kind, layers.Dense(3, use_bias=False, dtype=policy), dtype=policy)
    layer(data(2, 4), training=True)
    master = layer.layer.kernel.numpy()
    rounded = tf.cast(tf.cast(master, "bfloat16"), "float32").numpy()
    expect(not np.array_equal(master, rounded), kind, "the master has more digits than bfloat16")


def norm_of_channels(kernel):
    return np.linalg.norm(np.asarray(kernel).reshape(-1, 3), axis=0)


def test_r6_a_depthwise_kernel_is_normalised_by_channel(kind):
    layer = KINDS[kind](layers.DepthwiseConv2D(3, use_bias=False))
    x = data(1, 5, 5, 3)
    layer.build(x.shape)
    impulse = np.zeros((1, 5, 5, 3), "float32")
    impulse[0, 2, 2] = 1.0
    for _ in range(40):
        y = layer(impulse, training=True)
    expect(abs(norm_of_channels(y).max() - 1) < 0.01, kind, "the largest channel has norm 1")


@pytest.mark.parametrize(
    ("make", "shape", "count"),
    [
        (lambda: layers.SeparableConv2D(2, 3), (1, 5, 5, 3), 2),
        (lambda: layers.LSTM(3), (1, 4, 2), 2),
        (lambda: layers.GRU(3), (1, 4, 2), 2),
        (lambda: layers.Bidirectional(layers.LSTM(3)), (1, 4, 2), 4),
        (lambda: layers.BatchNormalization(), (2, 3), 1),
    ],
)
def test_r6_layers_without_an_attribute_kernel(kind, make, shape, count):
    layer = KINDS[kind](make())
    try:
        layer(data(*shape), training=True)
        works = kind == "keras" or len(layer.effective_weights()) == count
    except ValueError:
        works = False
    expect(works, kind, "the layer can be wrapped")


def test_r6_a_transposed_convolution_by_its_output_axis(kind):
    layer = KINDS[kind](layers.Conv2DTranspose(2, 2, strides=2, use_bias=False))
    layer.build((None, 2, 2, 6))
    layer.layer.kernel.assign(data(2, 2, 2, 6, seed=1))
    for _ in range(30):
        layer(data(1, 2, 2, 6), training=True)
    used = layer.layer.kernel.numpy() if kind == "keras" else layer.effective_weights()["kernel"].numpy()
    sigma = np.linalg.norm(used.transpose(0, 1, 3, 2).reshape(-1, 2), 2)
    expect(abs(sigma - 1) < 0.01, kind, "everything x output axis has norm 1")


def test_r7_an_embedding_of_integers_stays_floating(kind):
    layer = KINDS[kind](layers.Embedding(5, 3))
    y = layer(np.array([[1, 2]], "int32"), training=True)
    expect(y.dtype == "float32", kind, "the output is that of the layer")
