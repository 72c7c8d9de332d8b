"""Images with noise, so that there is something to average out."""

import numpy as np

from experiments.data import images


def noisy(name="digits", data_dir=None, noise=0.3, seed=0):
    """`(x, y), (x_test, y_test)`: the images of `experiments.data` with normal noise in every pixel."""
    rng = np.random.default_rng(seed)
    return [((x + noise * rng.normal(size=x.shape)).astype("float32"), y) for x, y in images(name, data_dir)]
