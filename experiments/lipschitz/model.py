"""One network in four versions: what is done to the kernels, and when, is all in which they differ."""

import functools

import keras
import tensorflow as tf
from keras import layers, ops

import tfloop

VERSIONS = ("plain", "constraint", "keras", "tfloop")
LAYERS = ("hidden_0", "hidden_1", "logits")


class DividedBySigma(keras.constraints.Constraint):
    """W <- W / sigma(W) after the update, sigma exact, by the SVD."""

    def __call__(self, w):
        return w / sigma(w)


class Dense(layers.Dense):
    """A dense layer that names the kernel which its forward pass uses."""

    def call(self, x):
        kernel = tfloop.tag(tf.convert_to_tensor(self.kernel), f"used/{self.name}")
        return self.activation(ops.matmul(x, kernel) + self.bias)


def build(version, image_shape=(8, 8, 1), units=128, classes=10, iterations=20):
    """Images (n, height, width, channels) to logits (n, classes), in one of the `VERSIONS`.

    Logged in every step, for every kernel: `sigma_<layer>` of the kernel that the forward pass uses, and
    `radial_<layer>`, the cosine of the gradient's angle to the kernel; and the slope between the batch's images.
    """
    wrap = {
        "keras": functools.partial(keras.layers.SpectralNormalization, power_iterations=iterations),
        "tfloop": functools.partial(tfloop.SpectralNormalization, iterations=iterations),
    }.get(version)
    x = images = keras.Input(image_shape, name="images")
    x = layers.Flatten(name="pixels")(x)
    for name in LAYERS:
        dense = Dense(
            classes if name == "logits" else units,
            activation=None if name == "logits" else "relu",
            dtype="float32" if name == "logits" else None,
            kernel_constraint=DividedBySigma() if version == "constraint" else None,
            name=name,
        )
        x = dense(x) if wrap is None else wrap(dense, name=f"normalised_{name}")(x)

    model = tfloop.Model(images, x, name=version)
    for name in LAYERS:
        path = f"{name}/kernel" if wrap is None else f"normalised_{name}/layer/kernel"
        model.add_metric(lambda t, name=name: sigma(t[f"used/{name}"]), name=f"sigma_{name}")
        model.add_metric(
            lambda t, path=path: cosine(t[f"gradients/{path}"], t[f"weights/{path}"]), name=f"radial_{name}"
        )
    model.add_metric(lambda t: slope_of_pairs(t["x"], t["y_pred"]), name="slope", aggregation="max")
    return model


def kernel(model, name):
    """The variable behind the kernel of a layer, that the optimizer moves."""
    found = {layer.name: layer for layer in model.layers}
    return found[name].kernel if name in found else found[f"normalised_{name}"].layer.kernel


def sigma(w):
    """The largest singular value of a matrix, a scalar."""
    return tf.linalg.svd(ops.cast(w, "float32"), compute_uv=False)[0]


def cosine(a, b):
    """Of the angle between two tensors taken as vectors; 0 if one is zero."""
    a, b = ops.cast(a, "float32"), ops.cast(b, "float32")
    return tf.math.divide_no_nan(ops.sum(a * b), ops.norm(a) * ops.norm(b))


def slope_of_pairs(x, y):
    """max |y_i - y_j| / |x_i - x_j| over all pairs of a batch: a lower bound of the Lipschitz constant."""
    rises, runs = distances(y), distances(ops.reshape(x, (ops.shape(x)[0], -1)))
    return ops.max(tf.math.divide_no_nan(rises, runs))


def distances(points):
    """Euclidean distances between all rows: (n, d) -> (n, n), float32."""
    points = ops.cast(points, "float32")
    return tf.norm(points[:, None] - points[None], axis=-1)
