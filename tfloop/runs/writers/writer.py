"""A writer takes scalars as rows, histograms and images, and keeps them in one format."""

import numpy as np


class Writer:
    """The interface. A format implements `rows`, and of the rest what it can show.

    `split`: `"train"` (a row a step), `"epoch"` (a row an epoch) or another. `step` counts completed
    updates, `epoch` counts from 0.
    """

    def rows(self, split, steps, epoch, names, values, present=None):
        """A block of rows of one epoch: `values[i, j]` is the value of `names[j]` at `steps[i]`.

        `present`: booleans of the shape of `values`; what is not present was not computed in that
        step, and is left out. The arrays may be kept: the caller does not change them.
        """
        raise NotImplementedError

    def scalars(self, split, step, epoch, values):
        """One row: `name -> number`."""
        block = np.array([list(values.values())], np.float64).reshape(1, len(values))
        self.rows(split, np.array([step]), epoch, list(values), block)

    def histogram(self, name, step, edges, counts):
        """Counts on fixed edges, ascending: `len(edges) == len(counts) + 1`."""

    def image(self, name, step, image):
        """An image: (height, width, 1, 3 or 4), integers 0 .. 255 or floats 0 .. 1."""

    def resume(self, step, epoch):
        """Removes the rows of later steps than `step`, and of epochs from `epoch` on, that are not over.

        Called once, before the first row, as a run goes on at `step` within or before `epoch`.
        """

    def flush(self):
        """Sends everything to the disk. `OSError` if it cannot be."""

    def close(self):
        """Flushes and closes. Nothing follows."""


class Composite(Writer):
    """Several writers as one."""

    def __init__(self, writers):
        self.writers = list(writers)

    def rows(self, split, steps, epoch, names, values, present=None):
        for writer in self.writers:
            writer.rows(split, steps, epoch, names, values, present)

    def histogram(self, name, step, edges, counts):
        for writer in self.writers:
            writer.histogram(name, step, edges, counts)

    def image(self, name, step, image):
        for writer in self.writers:
            writer.image(name, step, image)

    def resume(self, step, epoch):
        for writer in self.writers:
            writer.resume(step, epoch)

    def flush(self):
        for writer in self.writers:
            writer.flush()

    def close(self):
        for writer in self.writers:
            writer.close()
