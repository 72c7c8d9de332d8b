"""Samples beside real images, each set as one grid."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def grids(path, sets):
    """Writes the picture. `sets`: title -> images (n, height, width, channels), n a square number."""
    figure, axes = plt.subplots(1, len(sets), figsize=(4.5 * len(sets), 4.9), layout="constrained")
    for axis, (title, images) in zip(axes, sets.items(), strict=True):
        axis.imshow(grid(images), cmap="gray_r", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
        axis.set_frame_on(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def grid(images):
    """One large image of a square number of them, with a gap between neighbours."""
    side = round(len(images) ** 0.5)
    images = np.pad(images[: side * side, ..., 0], [(0, 0), (0, 1), (0, 1)])
    height, width = images.shape[1:]
    return images.reshape(side, side, height, width).transpose(0, 2, 1, 3).reshape(side * height, side * width)
