"""BatchNorm statistics measured anew, over the whole data.

The moving statistics of BatchNormalization belong to the weights of the last updates. After the
weights were set to something else (an average, a file) they are wrong, and accuracy falls.
"""

import collections
import contextlib
import inspect
import itertools
import math

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfloop import names
from tfloop.plain import plain_variable
from tfloop.progress import progress


def reestimate_batch_norm(model, data, steps=None, batch_size=32, verbose=1):
    """Sets the moving statistics of BatchNormalization layers to those of the data.

    One pass over the data, in which these layers normalise with the statistics of the batch and
    everything else is as in inference (no dropout). Each layer's moving mean and variance become
    the mean and the variance (within and between batches, weighted by count) of all that entered
    it. A layer so sees what earlier layers made with batch statistics, as in training, not what they
    make with their new ones.

    `data`: arrays (a structure as the model takes it, or a tuple `(x, y)` or `(x, y, weights)`, of
    which x is used), a `tf.data.Dataset`, a `keras.utils.PyDataset`, or an iterable of batches. A
    list is one of batches if it holds tuples, or several arrays for a model of one input.
    `steps`: the number of batches used; all by default. `batch_size`: of arrays.

    Counts are of examples, or of positions where there are several (pixels, time steps); masked ones
    are left out. So are calls with `training=False` in training too, and layers that are frozen or
    called only like that keep their statistics. Every other state (weights, seeds, metrics) is what it was before,
    and so are these statistics if the pass fails.

    Returns the paths of the layers it set; an empty list, at once and with a line in the log, if
    there are none. Raises `ValueError` if there is no batch, no end of them and no `steps`, or if a layer's calls
    with `training=False` cannot be told, as there are more or fewer calls in training.

    ```python
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="norm")])
    x = np.random.default_rng(0).normal(5.0, 2.0, size=(100, 3)).astype("float32")
    assert tfloop.reestimate_batch_norm(model, x, batch_size=7, verbose=0) == ["norm"]
    np.testing.assert_allclose(model.layers[0].moving_variance, x.var(0), rtol=1e-5)
    ```
    """
    batches, count = batches_of(data, batch_size, model)
    if steps is None and count == math.inf:
        raise ValueError("The data have no end: say how many batches to use (steps=...).")
    if steps is not None:
        batches, count = itertools.islice(batches, steps), min(steps, count or steps)
    if not model.built:
        first = next(batches, None)
        if first is not None:
            forward(model, first, training=False)
            batches = itertools.chain([first], batches)
    layers = trained_layers(model)
    if not layers:
        logging.warning("%r has no BatchNormalization that trains: there is nothing to do.", model.name)
        return []
    shown = progress(batches, count, title="BatchNorm statistics", verbose=verbose)
    with restored(other_state(model)):
        statistics = measure(model, layers, shown)
    for path, statistic in statistics.items():
        statistic.write_to(layers[path])
    return list(statistics)


def trained_layers(model):
    """`path -> layer` of the BatchNormalization layers that are built and not frozen."""
    return {
        path: layer
        for path, layer in names.walk(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable and layer.built
    }


def measure(model, layers, batches):
    """`path -> Statistic` over all batches, of the layers that saw any."""
    first = next(batches, None)
    if first is None:
        raise ValueError("There is no batch in the data.")
    calls = {path: flags for path, flags in calls_in_training(model, layers, first).items() if any(flags)}
    statistics = {path: Statistic(layers[path]) for path in calls}
    counts = collections.Counter[str]()

    def measuring(path, call):
        def measured(inputs, training=None, mask=None):
            flags, index = calls[path], counts[path]
            counts[path] += 1
            if not (all(flags) or flags[index : index + 1] == [True]):
                return call(inputs, training=False, mask=mask)
            statistics[path].add(inputs, mask)
            return call(inputs, training=True, mask=mask)

        return measured

    @tf.function(reduce_retracing=True)
    def step(x):
        counts.clear()
        forward(model, x, training=False)
        for path, flags in calls.items():
            if not all(flags) and counts[path] != len(flags):
                raise ValueError(
                    f"{path!r} is called {len(flags)} times in training, {flags.count(False)} of these with "
                    f"training=False, and {counts[path]} times in inference. Expected the same calls in both."
                )

    with replaced_calls({path: layers[path] for path in statistics}, measuring):
        for x in itertools.chain([first], batches):
            step(x)
    return {path: s for path, s in statistics.items() if np.any(s.count.numpy() > 0)}


def calls_in_training(model, layers, x):
    """`path -> [whether it uses batch statistics]` of a layer's calls in training, in order, by tracing them."""
    found = {path: [] for path in layers}

    def noting(path, call):
        def noted(inputs, training=None, mask=None):
            found[path].append(training is not False)  # None: nobody decided
            return call(inputs, training=training, mask=mask)

        return noted

    with replaced_calls(layers, noting):
        tf.function(lambda: forward(model, x, training=True)).get_concrete_function()
    return found


def forward(model, x, training):
    """The model's output. A model whose `call` takes no `training` is called without."""
    if "training" in inspect.signature(model.call).parameters:
        return model(x, training=training)
    return model(x)


class Statistic:
    """Count, mean and sum of squared deviations by channel, in float64, of all batches so far.

    Batches are merged by Chan, Golub and LeVeque (1979): exact in any order, and without the
    cancellation of a sum of squares.
    """

    def __init__(self, layer):
        self.axis = layer.axis
        zeros = tf.zeros(layer.moving_mean.shape, tf.float64)
        self.count, self.mean, self.deviation = (plain_variable(zeros) for _ in range(3))

    def add(self, x, mask=None):
        """Adds a batch. `mask`: as `x` without its last axis, false where a position is left out."""
        x = tf.cast(x, tf.float64)
        axes = [i for i in range(x.shape.rank) if i != self.axis % x.shape.rank]
        if mask is None:
            mean, variance = tf.nn.moments(x, axes)
            size = tf.size(x, tf.int64) // tf.size(mean, tf.int64)
            count = tf.fill(tf.shape(mean), tf.cast(size, tf.float64))
            return self._merge(count, mean, variance * count)
        here = tf.broadcast_to(tf.cast(mask, tf.bool)[..., None], tf.shape(x))
        count = tf.reduce_sum(tf.cast(here, tf.float64), axes, keepdims=True)
        total = tf.reduce_sum(tf.where(here, x, 0.0), axes, keepdims=True)
        mean = tf.math.divide_no_nan(total, count)
        deviation = tf.reduce_sum(tf.where(here, (x - mean) ** 2, 0.0), axes)
        return self._merge(tf.reshape(count, [-1]), tf.reshape(mean, [-1]), deviation)

    def _merge(self, count, mean, deviation):
        total = self.count + count
        difference = mean - self.mean
        between = tf.math.divide_no_nan(self.count * count, total) * difference**2
        self.deviation.assign_add(deviation + between)
        self.mean.assign_add(difference * tf.math.divide_no_nan(count, total))
        self.count.assign(total)

    def write_to(self, layer):
        count = self.count.numpy()
        seen = count > 0
        mean = np.where(seen, self.mean, layer.moving_mean)
        variance = np.where(seen, self.deviation / np.maximum(count, 1), layer.moving_variance)
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(variance)
        if layer.renorm:  # keeps the square root as well
            layer.moving_stddev.assign(np.sqrt(variance + layer.epsilon))


@contextlib.contextmanager
def replaced_calls(layers, make):
    """Within the block `layer.call` is `make(path, layer.call)` for every one of the layers."""
    before = {path: vars(layer).get("call") for path, layer in layers.items()}
    for path, layer in layers.items():
        vars(layer)["call"] = make(path, layer.call)
    try:
        yield
    finally:
        for path, layer in layers.items():
            del vars(layer)["call"]
            if before[path] is not None:
                vars(layer)["call"] = before[path]


def other_state(model):
    """Everything that a forward pass can change: statistics, seeds, metrics. Trainable weights it
    does not."""
    variables = list(model.variables)
    for _, layer in names.walk(model):
        variables += getattr(layer, "metrics_variables", ())
    return list({id(v): v for v in variables if not v.trainable}.values())


@contextlib.contextmanager
def restored(variables):
    saved = [np.array(v.numpy()) for v in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, saved, strict=True):
            variable.assign(value)


def batches_of(data, batch_size, model):
    """An iterator over the x of every batch, and how many there are (None: unknown, inf: no end)."""
    if isinstance(data, tf.data.Dataset):
        count = int(data.cardinality())
        counts = {tf.data.INFINITE_CARDINALITY: math.inf, tf.data.UNKNOWN_CARDINALITY: None}
        return map(x_of, data), counts.get(count, count)
    if isinstance(data, keras.utils.PyDataset):
        count = data.num_batches
        return (x_of(data[i]) for i in range(count)), count
    if is_arrays(data) and not is_list_of_batches(data, model):
        x = keras.tree.map_structure(np.asarray, x_of(data))
        sizes = {len(a) for a in keras.tree.flatten(x)}
        if not sizes:
            raise ValueError("There is no batch in the data.")
        if len(sizes) != 1:
            raise ValueError(f"The arrays have different numbers of examples: {sorted(sizes)}.")
        (size,) = sizes
        starts = range(0, size, batch_size)
        cut = lambda i: keras.tree.map_structure(lambda a: tensor(a[i : i + batch_size]), x)
        return map(cut, starts), len(starts)
    return map(x_of, data), len(data) if hasattr(data, "__len__") else None


def is_arrays(data):
    """Whether `data` is arrays, or a structure of them, and not an iterable of batches."""
    leaves = keras.tree.flatten(data)
    return all(leaf is None or hasattr(leaf, "shape") for leaf in leaves)


def is_list_of_batches(data, model):
    if not isinstance(data, list):
        return False
    return any(isinstance(item, tuple) for item in data) or len(data) > len(getattr(model, "inputs", None) or data) == 1


def x_of(batch):
    """Of `(x, y)` and `(x, y, sample_weight)` the x, as tensors."""
    x = batch[0] if isinstance(batch, tuple) else batch
    return keras.tree.map_structure(tensor, x)


def tensor(value):
    return value if tf.is_tensor(value) else tf.convert_to_tensor(value)
