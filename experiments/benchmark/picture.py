"""The ratios of all workloads as bars."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

AGAINST = {"keras": "Keras' fit", "keras, best": "Keras' fit, best setting", "loop by hand": "best loop by hand"}


def draw(path, workloads):
    """`workloads`: name -> what `measure` gives. A bar below 1 means that tfloop takes less time."""
    figure, axis = plt.subplots(figsize=(11, 4.5), layout="constrained")
    places = np.arange(len(workloads))
    for i, (rival, label) in enumerate(AGAINST.items()):
        axis.bar(places + 0.27 * (i - 1), [w["ratios"][rival] for w in workloads.values()], 0.25, label=label)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(places, workloads, rotation=30, ha="right")
    axis.set_ylabel("time of a step: tfloop / rival")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
