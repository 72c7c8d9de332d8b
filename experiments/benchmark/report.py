"""The results as a table and as a picture."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RIVALS = ("keras", "keras, best", "step by hand", "loop by hand", "tfloop")
COLOURS = {"keras": "#9e9e9e", "keras, best": "#616161", "step by hand": "#90caf9", "loop by hand": "#1976d2"}


def table(results):
    """A Markdown table: milliseconds a step, and tfloop's time as a share of its rivals'."""
    head = ("workload", *RIVALS, "engine", "/ keras", "at most", "/ keras, best", "/ loop by hand")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, result in results.items():
        seconds = result["seconds"]
        cells = [f"{1e3 * seconds[rival]:.3g}" for rival in RIVALS]
        ratios = [seconds["tfloop"] / seconds[rival] for rival in ("keras", "keras, best", "loop by hand")]
        first, *others = (f"{ratio:.2f}" for ratio in ratios)
        row = (name, *cells, result["which"]["tfloop"], first, f"{result['target']:.2f}", *others)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def listing(title, values, unit, scale=1.0):
    """Named numbers, one a line."""
    width = max(map(len, values))
    return "\n".join([title, *(f"  {name:<{width}}  {scale * value:.3g} {unit}" for name, value in values.items())])


def picture(results, path):
    """Each rival's time a step as a share of Keras' `fit`, by workload."""
    fig, axis = plt.subplots(figsize=(8, 0.5 * len(results) + 1.2))
    for i, result in enumerate(results.values()):
        seconds = result["seconds"]
        for rival in RIVALS:
            colour, size = (COLOURS[rival], 40) if rival in COLOURS else ("#d32f2f", 70)
            label = rival if i == 0 else None
            axis.scatter(seconds[rival] / seconds["keras"], i, s=size, color=colour, label=label, zorder=3)
    axis.set_yticks(range(len(results)), list(results))
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("time of a step, as a share of Keras' fit")
    axis.grid(axis="x", alpha=0.4)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(RIVALS), frameon=False)
    fig.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(fig)
