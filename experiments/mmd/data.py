"""Two domains: images with labels, and others, lit from one side, without."""

import numpy as np

from experiments.data import images


def domains(name="digits", data_dir=None, seed=0):
    """`(source, labels), (target, target_labels), (target_test, test_labels)`.

    Half of the training images are the source. The other half, lit from one side, are the target; its labels
    are for judging only. The target's test images are the test images under the same light.
    """
    (x, y), (x_test, y_test) = images(name, data_dir)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    source, target = np.split(order[: len(x) // 2 * 2], 2)
    return (x[source], y[source]), (lit(x[target], rng), y[target]), (lit(x_test, rng), y_test)


def lit(images, rng):
    """The images with less contrast, in a light that falls from the right, and a little noise."""
    light = np.linspace(0.0, 0.8, images.shape[2])[:, None]
    return (0.6 * images + light + 0.05 * rng.normal(size=images.shape)).astype("float32")
