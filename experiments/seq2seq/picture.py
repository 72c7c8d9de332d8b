"""What was decoded, and at which words the decoder looked."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from experiments.seq2seq import data


def attention_maps(path, numbers, signs, attention):
    """Writes the picture: for every number a map of attention (signs x words)."""
    columns = 2
    rows = -(-len(numbers) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.5 * columns, 3.4 * rows), layout="constrained")
    for axis, number, chosen, weights in zip(axes.flat, numbers, signs, attention, strict=True):
        words = data.words(number)
        read = [data.DIGITS[sign] for sign in chosen if sign]
        axis.imshow(weights[: len(read), : len(words)], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(words)), words, rotation=40, ha="right")
        axis.set_yticks(range(len(read)), read)
        axis.set_title(f"{number} read as {data.digits(chosen)}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
