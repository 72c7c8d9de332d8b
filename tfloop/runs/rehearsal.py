"""Rehearsals: what a training would be, without training and without writing anything.

`dry_run` shows data, model and one step; `verify` makes the first steps twice; `one_batch` is data to overfit.
"""

import itertools

import keras
import numpy as np
import tensorflow as tf

from tfloop import reproducibility
from tfloop.averaging import WeightAverage
from tfloop.loop import source as sources
from tfloop.loop.feed import batches_of
from tfloop.loop.observer import Observer
from tfloop.runs.sentry import leaves, replayed
from tfloop.runs.session import make_state

STEPS = 10  # of a verification


class First(Observer):
    """Ends a fit after so many steps."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    def limit(self, steps):
        return min(steps, self._left)

    def on_chunk(self, record, feed):
        self._left -= len(record)
        self.model.stop_training = self._left <= 0
        return record


def verify(model, x, y, steps=STEPS, **arguments):
    """Trains the first steps twice from one state. A sentence that names the first variable that differs, or `None`.

    The model is left as it was.
    """
    arguments = _without_a_trace(arguments)
    source = build(model, x, y, arguments)
    if not source.addressable:
        x, y, arguments = _recorded(source, steps * model._tfloop_choices["accumulate"], arguments)
    variables = {**reproducibility.state_variables(model), **reproducibility.process_variables(create=True)}
    before, random = reproducibility.snapshot(variables), reproducibility.random_state()
    found = []
    try:
        for _ in range(2):
            reproducibility.assign(variables, before)
            reproducibility.set_random_state(random)
            model.fit(x, y, **{**arguments, "callbacks": [*arguments["callbacks"], First(steps)]})
            found.append(reproducibility.snapshot(variables))
    finally:
        reproducibility.assign(variables, before)
        reproducibility.set_random_state(random)
    return reproducibility.first_difference(*found)


def _recorded(source, count, arguments):
    """`(x, y, arguments)` of a fit that reads the first `count` batches of a stream, each time the same."""
    given = "sample_weight", "batch_size", "class_weight", "shuffle", "steps_per_epoch"
    kept = {name: value for name, value in arguments.items() if name not in given}
    return Recorded(itertools.islice(batches_of(source.feeder(0)), count)), None, kept


class Recorded:
    """Batches that were read once."""

    def __init__(self, batches):
        self._batches = list(batches)

    def __iter__(self):
        return iter(self._batches)


def _without_a_trace(arguments):
    """The arguments of a fit that validates nothing, shows nothing and calls no callback but averages."""
    kept = ("validation_data", "validation_split", "validation_steps", "validation_batch_size", "validation_freq")
    found = {name: value for name, value in arguments.items() if name not in kept}
    callbacks = keras.tree.flatten(arguments.get("callbacks") or [])
    return {**found, "verbose": 0, "callbacks": [c for c in callbacks if isinstance(c, WeightAverage)]}


def _source(model, x, y, arguments):
    names = ("sample_weight", "batch_size")
    given = {name: arguments.get(name) for name in names}
    return sources.make_source(
        x,
        y,
        **given,
        steps=arguments.get("steps_per_epoch"),
        shuffle=arguments.get("shuffle", True),
        class_weight=arguments.get("class_weight"),
        seed=reproducibility.current_seed() or 0,
        goes_on=True,
    )


def build(model, x, y, arguments):
    """Makes all variables of a model, as `fit` would. Returns the source of its data."""
    loop = model._tfloop_get_loop()
    source = _source(model, x, y, arguments)
    loop.build(source)
    make_state(model, loop, source)
    return source


def one_batch(x, y, arguments):
    """`(x, y, arguments)` of a fit that sees the first batch again and again, as many steps as it would have had."""
    batch_size, steps = arguments.pop("batch_size", None), arguments.pop("steps_per_epoch", None)
    for name in ("shuffle", "validation_split"):  # the batch is trained on whole
        arguments.pop(name, None)
    weight = arguments.pop("sample_weight", None)
    source = sources.make_source(x, y, weight, batch_size, steps, goes_on=True)
    batch = next(batches_of(source.feeder(0)))
    x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
    size = sources.common_length(batch)
    one = {"batch_size": size, "shuffle": False, "sample_weight": weight, "steps_per_epoch": source.steps or 100}
    return x, y, {**arguments, **one}


def dry_run(model, x, y, **arguments):
    """Yields lines about the data, the model and one step, which is taken back."""
    source = build(model, x, y, arguments)
    batch = next(batches_of(source.feeder(0)))
    of_batch = list(leaves(batch))
    count = model._tfloop_choices["accumulate"]
    steps = f"{-(-source.steps // count) if source.steps else 'unknown'} steps{f' of {count} batches' * (count > 1)}"
    yield f"{steps} an epoch, {arguments.get('epochs', 1)} epochs. The first batch:"
    yield from table((name, *_described(leaf)) for name, leaf in of_batch)
    variables = {**reproducibility.state_variables(model), **reproducibility.process_variables()}
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    rest = sum(int(np.prod(v.shape)) for v in model.non_trainable_variables)
    size = sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in variables.values())
    yield f"\n{model.name}: {trained:,} parameters are trained, {rest:,} are not; {size / 2**20:.1f} MiB of state."
    tensors = list(dict(replayed(model, batch, variables)).items())  # those of the first replica, if there are several
    names = {name for name, _ in of_batch}
    yield f"\nThe {len(tensors)} tensors of a step, by which losses, metrics and --watch call them:"
    yield from table((name, *_described(tensor)) for name, tensor in tensors if name not in names)
    before = reproducibility.snapshot(variables)
    try:
        row, layout = model._tfloop_get_loop().step(batch)
    finally:
        reproducibility.assign(variables, before)
    yield f"\nThe first step, on {abs(int(row[0]))} examples:"
    yield from table((c.name, f"{float(row[s.start]):.6g}") for c, s in layout.slices() if c.width == 1)


def _described(tensor):
    """Dtype and shape, and the range of what is a number."""
    dtype, shape = tf.as_dtype(tensor.dtype).name, list(tensor.shape)
    yield f"{dtype}{shape}"
    array = np.asarray(tensor) if isinstance(tensor, tf.Tensor | np.ndarray) else None
    if array is not None and array.size and np.issubdtype(array.dtype, np.number):
        yield f"{array.min():.4g} .. {array.max():.4g}"


def table(rows):
    """Rows of texts as lines in columns."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(3)]
    for row in rows:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False)).rstrip()
