"""Replay: what an earlier process read of a stream is read again, so that the batches to come are the same.

Everything is read as training read it. Only where it is certain that a shorter way leads to the same place, it is
taken: a `tf.data` pipeline in a fixed order starts anew by itself, and one that shuffles anew in every epoch draws its
seeds when it is opened; a `keras.utils.PyDataset` is told that epochs begin and end.

What draws from the global random numbers of Python or NumPy while it is read draws the same again from where the
process began: then nobody may set them.
"""

import warnings
import weakref

from absl import logging

from tfloop import _keras, reproducibility
from tfloop.loop.feed import batches_of

FIXED, RESHUFFLES, UNKNOWN = "fixed", "reshuffles", "unknown"

# The stages that pass on what they get, in its order.
STAGES = frozenset(
    "TensorSlice Tensor Range TFRecord TextLine FixedLengthRecord Batch ParallelBatch PaddedBatch DenseToRagged Map "
    "ParallelMap Filter Prefetch Take Skip Shard Zip Options Restructured AssertCardinality Unbatch".split()
)
# Those that open what comes before them not exactly once in an epoch.
REOPENING = frozenset("Repeat Concatenate Cache FlatMap Interleave ParallelInterleave".split())
# Operations that TensorFlow calls stateful, and that keep nothing from one pass to the next: those that draw random
# numbers begin anew with each iterator.
HARMLESS = frozenset(
    "ReadFile LookupTableFindV2 ReadVariableOp VarHandleOp Assert TensorDataset TensorSliceDataset TFRecordDataset "
    "TFRecordDatasetV2 TextLineDataset FixedLengthRecordDataset FixedLengthRecordDatasetV2 RandomUniform "
    "RandomUniformInt RandomStandardNormal TruncatedNormal RandomShuffle Multinomial".split()
)


def nature(dataset):
    """Whether a `tf.data.Dataset` gives the same in every epoch, shuffles anew in each, or one cannot tell."""
    stage = _keras.dataset_stage(dataset)
    inputs = {nature(d) for d in stage.inputs}
    if UNKNOWN in inputs or not HARMLESS.issuperset(stage.stateful):
        return UNKNOWN
    if stage.name == "Shuffle":
        return RESHUFFLES if stage.reshuffles or RESHUFFLES in inputs else FIXED
    if stage.name in STAGES or (stage.name in REOPENING and RESHUFFLES not in inputs):
        return RESHUFFLES if RESHUFFLES in inputs else FIXED
    return UNKNOWN


def count_through(source, epochs, random=None):
    """Brings a source from the beginning of the first of these epochs to the end of the last.

    Returns whether that drew from the global random numbers of Python or NumPy. `random`: their `random_state` before
    anything was read; now, if not given.
    """
    if source.addressable or not epochs:
        return False
    if source.read_before and not source.rereadable:
        logging.warning(
            "Earlier epochs were read from the same generator or dataset in this process. It goes on where it is, so "
            "the batches may differ from those of an uninterrupted run: make a new one for each fit."
        )
        return False
    random = random or reproducibility.random_state()
    drew = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of data that end early: they did so before, too
        for epoch in epochs:
            if drew or not source.skip_epoch(epoch):
                for _ in batches_of(source.feeder(epoch)):
                    pass
            drew = drew or (source.may_draw and not reproducibility.is_random_state(random))
    return drew


_read: weakref.WeakSet = weakref.WeakSet()


def was_read(data):
    """Whether a fit in this process was given these data before. From now on it was."""
    try:
        before = data in _read
        _read.add(data)
    except TypeError:  # it cannot be referred to weakly
        return False
    return before
