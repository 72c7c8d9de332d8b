"""Batchwise: predictions, and steps on single batches, as `predict` and the `..._on_batch` methods make them.

Beside the loop: there are no epochs, no engine is chosen, and Python sees each batch.
"""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from tfloop import names
from tfloop.loop import source as sources
from tfloop.loop.feed import batch_of, batches_of, flat, packed, spec_of
from tfloop.loop.hooks import Hooks
from tfloop.loop.record import Aggregate
from tfloop.progress import Progress


class Batchwise:
    """Predictions of a model, and its steps on single batches."""

    def __init__(self, steps, runner):
        self._steps = steps
        self._runner = runner
        self._known = set()  # kinds and forms of batches that were seen before

    def step(self, kind, x, y, sample_weight=None, class_weight=None):
        """One step on one batch, with metrics that begin anew. Returns its values by name."""
        batch = tf.nest.map_structure(sources.as_array, keras.utils.pack_x_y_sample_weight(x, y, sample_weight))
        if class_weight is not None:
            batch = sources.weighing(class_weight)(batch)
        sources.common_length(batch)
        spec = spec_of(batch)
        with self._steps.undivided():
            self._runner.build(kind, spec, lambda: batch)
            with self._unchanging(kind, spec):
                if kind == "train":
                    self._steps.start()
                aggregate = Aggregate()
                aggregate.add(self._runner.run_batch(kind, spec, flat(batch), self._steps.eager))
                values = aggregate.values()
                self._steps.publisher()(values)
        return values

    def predict_on_batch(self, x):
        batch = tf.nest.map_structure(sources.as_array, keras.utils.pack_x_y_sample_weight(x))
        spec = spec_of(batch)
        self._steps.build_for_prediction(batch if self._steps.needs_batch("predict") else spec)
        with self._unchanging("predict", spec):
            return tf.nest.map_structure(to_numpy, self._runner.predict(spec, flat(batch), self._steps.eager))

    def predict(self, x, *, batch_size, verbose, steps, callbacks):
        source = sources.make_source(x, None, None, batch_size, steps)
        self._steps.build_for_prediction(first_batch(source) if self._steps.needs_batch("predict") else source.spec)
        model = self._steps.model
        hooks = Hooks(callbacks, model, epochs=1, steps=source.steps, verbose=verbose)
        bar = Progress(source.steps, verbose=verbose)
        model.stop_predicting = False
        outputs = []
        hooks.on_predict_begin()
        with self._runner.unchanging():
            for i, batch in enumerate(batches_of(source.feeder(0))):
                hooks.on_predict_batch_begin(i)
                outputs.append(self._runner.predict(spec_of(batch), flat(batch), self._steps.eager))
                hooks.on_predict_batch_end(i, {"outputs": outputs[-1]})
                bar.update(i + 1, {})
                if model.stop_predicting:
                    break
        hooks.on_predict_end()
        if not outputs:
            raise ValueError("The data are empty: there is no batch to predict. Expected at least one.")
        bar.finish()
        return tf.nest.map_structure(lambda *parts: concatenated(parts), *outputs)

    @contextlib.contextmanager
    def _unchanging(self, kind, spec):
        """The model is walked over once, except in the first step on such a batch, which may still make layers."""
        batch = kind, *flat(spec)
        with names.unchanging() if batch in self._known else contextlib.nullcontext():
            yield
        self._known.add(batch)


def first_batch(source):
    """A source's first batch, which is trained on later, in its turn."""
    feed = source.sample(1, 1)
    tensors = flat(feed.args[0].get_next()) if feed.kind == "iterator" else batch_of(feed.kind, feed.args, 0)
    return packed(feed.spec, tensors)


def concatenated(parts):
    """Batches as one array. A ragged tensor where they differ in other dimensions than the first."""
    parts = [to_numpy(p) for p in parts]
    if isinstance(parts[0], tf.SparseTensor):
        return tf.sparse.concat(0, parts)
    if isinstance(parts[0], tf.RaggedTensor):
        return tf.concat(parts, 0)
    if len(parts) == 1:
        return parts[0]
    parts = [np.atleast_1d(p) for p in parts]
    different = [i for i, sizes in enumerate(zip(*(p.shape[1:] for p in parts), strict=True), 1) if len(set(sizes)) > 1]
    if not different:
        return np.concatenate(parts)
    return tf.concat([tf.RaggedTensor.from_tensor(p, ragged_rank=different[-1]) for p in parts], 0)


def to_numpy(value):
    return value.numpy() if hasattr(value, "numpy") and not isinstance(value, tf.RaggedTensor) else value
