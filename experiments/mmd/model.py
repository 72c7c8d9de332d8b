"""A classifier of two domains. Everything that training needs is an input, the labels too."""

import keras
from keras import layers, ops

import tfloop


def build(image_shape, classes=10, mmd_weight=0.3):
    """The training model: images of both domains and the source's labels in; of the target, logits and features out.

    Two losses on tensors of the graph: the source is classified, and the distance between what the layer
    `features` makes of either domain is reduced (Long et al. 2015, arXiv:1502.02791).
    """
    source = keras.Input(image_shape, name="source")
    target = keras.Input(image_shape, name="target")
    labels = keras.Input((), dtype="int32", name="labels")

    features = keras.Sequential(
        [
            layers.Conv2D(32, 3, activation="relu", padding="same"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu", padding="same"),
            layers.Flatten(),
            layers.Dense(64, activation="relu", dtype="float32"),
        ],
        name="features",
    )
    classifier = layers.Dense(classes, name="logits", dtype="float32")
    of_source, of_target = features(source), features(target)

    inputs = {"source": source, "target": target, "labels": labels}
    model = tfloop.Model(inputs, {"logits": classifier(of_target), "features": of_target})
    crossentropy = ops.sparse_categorical_crossentropy(labels, classifier(of_source), from_logits=True)
    distance = mmd2(of_source, of_target)
    model.add_loss(ops.mean(crossentropy), name="classification")
    model.add_loss(distance, name="alignment", weight=mmd_weight)
    model.add_metric(distance, name="mmd")
    return model


def mmd2(a, b, scales=(0.25, 0.5, 1.0, 2.0, 4.0)):
    """The squared maximum mean discrepancy of two samples, of shapes (n, d) and (m, d): a scalar.

    A sum of Gaussian kernels, whose widths are `scales` times the mean squared distance between the
    samples. The biased estimate of Gretton et al. (2012), eq. 5: never negative.
    """
    within_a, within_b, between = squared_distances(a, a), squared_distances(b, b), squared_distances(a, b)
    width = ops.stop_gradient(ops.mean(between)) + 1e-6

    def kernel(distances):
        return sum(ops.mean(ops.exp(-distances / (scale * width))) for scale in scales)

    return kernel(within_a) + kernel(within_b) - 2 * kernel(between)


def squared_distances(a, b):
    """Of every row of `a` from every row of `b`: (n, m)."""
    squares_a, squares_b = ops.sum(a**2, axis=1), ops.sum(b**2, axis=1)
    return ops.maximum(squares_a[:, None] + squares_b[None, :] - 2 * ops.matmul(a, ops.transpose(b)), 0.0)
