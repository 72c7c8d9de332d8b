"""The latent plane: where the test images lie in it, and what the decoder makes of its points."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def latent_plane(path, model, images, labels, points=15):
    """Writes the picture for a model of two latent dimensions (of more: the first two, the rest 0)."""
    means = np.asarray(model.encode(images)[0])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    scatter = left.scatter(means[:, 0], means[:, 1], c=labels, cmap="tab10", s=12)
    left.legend(*scatter.legend_elements(), loc="upper right", fontsize=7)
    left.set(title="mean of q(z|x), test images", xlabel="z[0]", ylabel="z[1]")
    right.imshow(grid(model, points), cmap="gray_r", extent=(-2, 2, -2, 2))
    right.set(title="what the decoder makes of z", xlabel="z[0]", ylabel="z[1]")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def grid(model, points):
    """One large image of `points` x `points` decoded ones, over -2 .. 2 in both directions."""
    along = np.linspace(-2, 2, points, dtype="float32")
    z = np.zeros((points, points, model.latent), "float32")
    z[..., 0], z[..., 1] = along[None, :], along[::-1, None]
    images = np.asarray(model.decode(z.reshape(-1, model.latent)))[..., 0]
    images = np.pad(images, [(0, 0), (1, 1), (1, 1)])  # a gap between neighbours
    height, width = images.shape[1:]
    rows = images.reshape(points, points, height, width).transpose(0, 2, 1, 3)
    return rows.reshape(points * height, points * width)
