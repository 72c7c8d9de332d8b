"""Accuracy by epoch: of the last weights, and of their average with either statistics."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = {
    "last": "last weights",
    "old_statistics": "average, statistics of the last weights",
    "own_statistics": "average, its own statistics",
}


def accuracy_by_epoch(path, epochs, curves):
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, accuracies in curves.items():
        axis.plot(epochs, accuracies, marker=".", label=NAMES[name])
    axis.set(xlabel="epoch", ylabel="accuracy on the test images", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
