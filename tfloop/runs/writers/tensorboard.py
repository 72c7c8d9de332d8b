"""TensorBoard: event files, written with TensorFlow alone.

`tf.summary.scalar` needs the `tensorboard` package, which TensorFlow 2.21 does not install, and takes
some 100 us a value. A step's scalars are one event here, some 20 us for 20 of them.
"""

import os
import time

import numpy as np
from absl import logging

from tfloop.runs.writers.writer import Writer

# TensorBoard shows at most 1000 points of a curve: of a block of rows so many are written.
ROWS_OF_A_BLOCK = 10


class TensorBoard(Writer):
    """Scalars, histograms and images as `<split>/<name>` and `<name>` in an event file of a folder.

    What cannot be written is a warning and ends this log, not the training: it is a view of what
    `metrics.jsonl` holds.
    """

    def __init__(self, folder, clock=time.time):
        self.folder = folder
        self._clock = clock
        self._file = None
        self._over = False

    def rows(self, split, steps, epoch, names, values, present=None):
        del epoch
        tags = [f"{split}/{name}" for name in names]
        for index in _thinned(len(steps)):
            there = range(len(tags)) if present is None else np.flatnonzero(present[index])
            row = values[index].tolist()
            self._add(int(steps[index]), [{"tag": tags[j], "simple_value": row[j]} for j in there])

    def histogram(self, name, step, edges, counts):
        import tensorflow as tf

        edges, counts = np.asarray(edges, np.float64), np.asarray(counts, np.float64)
        bars = np.stack([edges[:-1], edges[1:], counts], axis=1)
        value = {"tag": name, "tensor": tf.make_tensor_proto(bars), "metadata": _metadata("histograms")}
        self._add(step, [value])

    def image(self, name, step, image):
        import tensorflow as tf

        image = np.asarray(image)
        if image.dtype.kind == "f":
            image = np.round(np.clip(np.nan_to_num(image), 0, 1) * 255)
        image = image.astype(np.uint8)
        height, width, channels = image.shape
        png = tf.io.encode_png(image).numpy()
        shown = tf.compat.v1.Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
        self._add(step, [{"tag": name, "image": shown}])

    def resume(self, step, epoch):
        """TensorBoard hides the points of steps after `step` that are in earlier files."""
        import tensorflow as tf

        start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        self._write(step=step + 1, session_log=start)

    def flush(self):
        if self._file is not None:
            self._guarded(self._file.flush)

    def close(self):
        if self._file is not None:
            self._guarded(self._file.close)
            self._file = None

    def _add(self, step, values):
        import tensorflow as tf

        summary = tf.compat.v1.Summary
        self._write(step=step, summary=summary(value=[summary.Value(**value) for value in values]))

    def _write(self, **event):
        import tensorflow as tf

        def write():
            if self._file is None:
                self._file = tf.io.TFRecordWriter(str(_next_file(self.folder, self._clock())))
                version = tf.compat.v1.Event(wall_time=self._clock(), file_version="brain.Event:2")
                self._file.write(version.SerializeToString())
            line = tf.compat.v1.Event(wall_time=self._clock(), **event)
            self._file.write(line.SerializeToString())

        if not self._over:
            self._guarded(write)

    def _guarded(self, action):
        import tensorflow as tf

        try:
            action()
        except (OSError, tf.errors.OpError) as error:
            self._over = True
            logging.warning("TensorBoard's log in %s cannot be written and ends here: %s", self.folder, error)


def _metadata(plugin):
    import tensorflow as tf

    summary_metadata = tf.compat.v1.SummaryMetadata
    return summary_metadata(plugin_data=summary_metadata.PluginData(plugin_name=plugin))


def _thinned(count):
    """The indices of at most `ROWS_OF_A_BLOCK` of `count` rows, evenly, the last one always."""
    kept = min(count, ROWS_OF_A_BLOCK)
    return [(index + 1) * count // kept - 1 for index in range(kept)]


def _next_file(folder, now):
    """A new event file whose name comes after all others: TensorBoard reads them in that order."""
    os.makedirs(folder, exist_ok=True)
    numbers = [name.split(".")[3] for name in os.listdir(folder) if name.startswith("events.out.tfevents.")]
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    return folder / f"events.out.tfevents.{max(last + 1, int(now)):010d}.tfloop"
