"""The features of both domains, without and with the loss that moves them together."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def both_domains(path, panels):
    """Writes the picture. `panels`: title -> `(source, labels, target, labels)`, features of shape (n, d)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5.5), layout="constrained")
    for axis, (title, (source, labels, target, target_labels)) in zip(axes, panels.items(), strict=True):
        plane = principal_plane(np.concatenate([source, target]))
        for name, marker, points, classes in (
            ("source", "o", plane[: len(source)], labels),
            ("target", "x", plane[len(source) :], target_labels),
        ):
            axis.scatter(*points.T, c=classes, cmap="tab10", marker=marker, s=18, linewidths=1, alpha=0.7, label=name)
        axis.set(title=title, xticks=[], yticks=[])
        axis.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def principal_plane(points):
    """The points in the plane in which they vary most: (n, d) to (n, 2)."""
    centred = points - points.mean(0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
