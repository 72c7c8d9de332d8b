"""The Fréchet distance between features of two sets of images (Heusel et al. 2017, arXiv:1706.08500).

The features are those of a small classifier of digits, trained here: what matters is that they tell digits
apart, and that they are the same for all that is compared.
"""

import keras
import numpy as np
from keras import layers

import tfloop


def classifier(image_shape=(8, 8, 1), classes=10, features=32):
    """A classifier whose layer `features` is what the distance is measured in."""
    x = images = keras.Input(image_shape, name="images")
    x = layers.Conv2D(16, 3, padding="same", activation="relu", name="conv_0")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(32, 3, padding="same", activation="relu", name="conv_1")(x)
    x = layers.Dense(features, activation="tanh", dtype="float32", name="features")(layers.Flatten()(x))
    return tfloop.Model(images, layers.Dense(classes, dtype="float32", name="logits")(x), name="classifier")


def features_of(model, images):
    """The features of images under a trained `classifier`, a float64 array (n, features)."""
    with tfloop.capture(model) as t:
        model(images, training=False)
    return np.asarray(t["features"], "float64")


def distance(a, b):
    """|mean a - mean b|² + tr(A + B - 2 (A B)^½), A and B the covariances: features (n, d), (m, d) -> float."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # A B has the eigenvalues of A^½ B A^½, which are not negative; rounding may say otherwise.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0))
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())
