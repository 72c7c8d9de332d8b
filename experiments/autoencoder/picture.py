"""Images, what the model makes of them, and where the two differ."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def reconstructions(path, model, images, count=12):
    """Writes the picture: `count` images from all over the set, in columns."""
    chosen = images[np.linspace(0, len(images) - 1, count).astype(int)]
    made = model.predict(chosen, verbose=0)
    rows = {"image": chosen, "reconstruction": made, "difference": np.abs(made - chosen)}
    figure, axes = plt.subplots(len(rows), 1, figsize=(count * 0.8, len(rows) * 0.95), layout="constrained")
    for axis, (name, row) in zip(axes, rows.items(), strict=True):
        axis.imshow(side_by_side(row), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], ylabel=name)
        axis.yaxis.label.set(rotation=0, ha="right", va="center")
        axis.set_frame_on(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def side_by_side(images):
    """(n, height, width, channels) to (height, n (width + 1)), with a gap between neighbours."""
    return np.concatenate([np.pad(image[..., 0], [(0, 0), (0, 1)]) for image in images], axis=1)
