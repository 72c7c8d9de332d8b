"""Sigma of every kernel in the steps that used it, and what becomes of gradient, slope and accuracy."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from experiments.lipschitz.model import LAYERS


def curves(path, logs):
    """Writes the picture. `logs`: version -> what `read_log` gives."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    for version, (steps, epochs) in logs.items():
        draw = {"label": version, "color": COLORS[version], "linewidth": 1.3}
        for axis, name in zip(axes[0], LAYERS, strict=True):
            axis.plot(steps["step"], steps[f"sigma_{name}"], **draw)
        axes[1, 0].plot(steps["step"], np.maximum(abs(steps["radial_hidden_1"]), ROUNDING), **draw)
        axes[1, 1].plot(epochs["step"], epochs["val_slope"], marker=".", **draw)
        axes[1, 2].plot(epochs["step"], epochs["val_accuracy"], marker=".", **draw)
    for axis, name in zip(axes[0], LAYERS, strict=True):
        axis.set(title=f"sigma of the kernel that the step used: {name}", xscale="log", yscale="log")
        axis.set_yticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"])
        axis.minorticks_off()
    axes[1, 0].set(title="|cos| of the gradient's angle to the kernel: hidden_1", yscale="log", ylim=(ROUNDING, 3))
    axes[1, 1].set(title="slope between test images", yscale="log")
    axes[1, 2].set(title="test accuracy", ylim=(0, 1))
    for axis in axes.flat:
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


ROUNDING = 1e-9  # what is below is drawn there
COLORS = {"plain": "tab:gray", "constraint": "tab:orange", "keras": "tab:green", "tfloop": "tab:blue"}
