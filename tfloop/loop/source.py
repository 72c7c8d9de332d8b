"""Source: where batches come from.

A source has `steps` an epoch (`None` where only reading tells), the `spec` of its batches, and a `feeder` for
every epoch, which hands out `Feed`s. A source that is `addressable` gives the batches of any (epoch, step)
without reading those before; one that is not is brought there by `replay.py`. What is not `rereadable` gives other
batches if it is read again in the same process. `sample` gives batches for a trial and takes none away.

This module makes a source of whatever a user gives as data.
"""

import functools
import itertools
from collections.abc import Iterable

import keras
import numpy as np
import tensorflow as tf

from tfloop.loop.arrays import ArraySource, picked
from tfloop.loop.feed import patiently, warn_ran_out
from tfloop.loop.streams import DatasetSource, PythonSource


def make_source(
    x,
    y=None,
    sample_weight=None,
    batch_size=None,
    steps=None,
    shuffle=False,
    class_weight=None,
    seed=0,
    goes_on=False,
):
    """The source for what a user gives to `fit`, `evaluate` or `predict`.

    With `goes_on`, as in training, epochs of `steps` batches begin in the data where the last ended. Else each begins
    anew, except for an iterator, and ends with the data.

    Raises `ValueError` for arguments that do not go together and for data of a kind that is not known.
    """
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    if shuffle not in (True, False, "batch"):
        raise ValueError(f"shuffle={shuffle!r}: expected True, False or 'batch'.")
    transform = None if class_weight is None else weighing(class_weight)
    if isinstance(x, tf.data.Dataset | keras.utils.PyDataset) or is_iterable_of_batches(x):
        for name, value in (("y", y), ("sample_weight", sample_weight), ("batch_size", batch_size)):
            if value is not None:
                raise ValueError(
                    f"`{name}` cannot be given when `x` is a {type(x).__name__}: its batches hold inputs, targets and "
                    "weights, as `(x, y)` or `(x, y, sample_weight)`."
                )
    if isinstance(x, tf.data.Dataset):
        dataset = x if transform is None else x.map(lambda *b: transform(b if len(b) > 1 else b[0]))
        return DatasetSource(dataset, steps, goes_on)
    if isinstance(x, keras.utils.PyDataset):
        skip = functools.partial(skip_pydataset, x)
        source = PythonSource(pydataset(x, shuffle, seed), steps or x.num_batches, standard(transform), skip=skip)
        source.endless, source.whole = goes_on and steps is not None, steps is None
        return source
    if hasattr(x, "__next__"):
        return PythonSource.of_iterator(x, steps, standard(transform))
    if is_iterable_of_batches(x):
        length = len(x) if hasattr(x, "__len__") else None
        source = PythonSource(lambda epoch: x, steps or length, standard(transform))
        source.endless, source.whole = goes_on and steps is not None, steps is None
        return source
    x, y, sample_weight = (
        None if part is None else standard_arrays(part, n)
        for part, n in ((x, "x"), (y, "y"), (sample_weight, "sample_weight"))
    )
    data = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
    common_length(data)
    if transform is not None:
        data = transform(data)
    of_arrays = ArraySource(data, batch_size or 32, shuffle, seed, steps)
    if steps is not None and steps > of_arrays.batches and not goes_on:
        warn_ran_out(steps)
        of_arrays.steps = of_arrays.batches
    return of_arrays


def standard(transform):
    """A function that makes arrays of the dtypes that Keras would use of what Python gives as a batch."""

    def make(batch):
        batch = as_batch(batch)
        return tf.nest.map_structure(as_array, batch if transform is None else transform(batch))

    return make


def pydataset(dataset, shuffle, seed):
    """`epoch -> iterator` over a PyDataset, in an order that is a function of (seed, epoch)."""

    def batches(epoch):
        dataset.on_epoch_begin()
        count = dataset.num_batches
        order: Iterable[int] = range(count) if count is not None else itertools.count()
        if shuffle and count is not None:
            order = np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch])).permutation(count).tolist()
        for i in order:
            yield patiently(functools.partial(dataset.__getitem__, i))
        dataset.on_epoch_end()

    return batches


def skip_pydataset(dataset, epoch):
    """Tells a PyDataset that an epoch began and ended."""
    dataset.on_epoch_begin()
    dataset.on_epoch_end()


def is_iterable_of_batches(x):
    """A generator or a torch-style loader: iterable, and neither an array nor a structure of arrays."""
    if x is None or isinstance(x, list | tuple | dict | str | bytes) or hasattr(x, "shape") or hasattr(x, "__array__"):
        return False
    return hasattr(x, "__iter__")


def as_batch(batch):
    """Loaders like torch's give lists; Keras' batches are tuples."""
    return tuple(batch) if isinstance(batch, list) else batch


def standard_arrays(part, name):
    """A structure of arrays as NumPy arrays or tensors of the dtypes that Keras would use."""
    if isinstance(part, list | tuple) and not any(hasattr(i, "shape") or isinstance(i, dict) for i in part):
        if not part or all(is_plain(item) for item in part):
            part = np.asarray(part)
    if isinstance(part, dict):
        return {key: standard_arrays(value, f"{name}/{key}") for key, value in part.items()}
    if isinstance(part, list | tuple):
        found = [standard_arrays(value, f"{name}/{i}") for i, value in enumerate(part)]
        return type(part)(*found) if hasattr(part, "_fields") else type(part)(found)
    array = as_array(part)
    if str(getattr(array, "dtype", "")) == "object" or not hasattr(array, "shape"):
        raise ValueError(
            f"`{name}` is of type {type(part).__name__}, which is no kind of data that can be trained on. Expected "
            "arrays, tensors, structures of them, a tf.data.Dataset, a PyDataset, a generator or a loader."
        )
    if len(array.shape) == 0:
        raise ValueError(f"`{name}` is a scalar, {part!r}. Expected an array with one entry an example.")
    return array


def is_plain(value):
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return isinstance(value, int | float | bool | np.generic)


def as_array(value):
    """NumPy arrays and tensors as they are, floats of 64 bits as Keras' floatx; the rest as NumPy arrays."""
    if value is None or isinstance(value, tf.Tensor | tf.RaggedTensor):
        return value
    if hasattr(value, "tocoo"):  # of SciPy
        value = value.tocoo()
        value = tf.SparseTensor(np.stack([value.row, value.col], 1).astype(np.int64), as_array(value.data), value.shape)
    if isinstance(value, tf.SparseTensor):
        return tf.sparse.reorder(value)
    if isinstance(value, tf.Variable | keras.Variable):
        return tf.convert_to_tensor(value)
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu().numpy()
    if hasattr(value, "to_numpy"):  # pandas: a series is a column, as in Keras
        is_series = hasattr(value, "iloc") and value.ndim == 1
        value = value.to_numpy()[:, None] if is_series else value.to_numpy()
    if not isinstance(value, np.ndarray):
        value = np.asarray(value)
    if isinstance(value, np.memmap):
        return value  # cast when its batches are made, not as a whole
    if value.dtype == object and all(isinstance(item, str | bytes) for item in value.flat):
        return tf.constant(value)
    return value.astype(keras.config.floatx()) if value.dtype == np.float64 else value


def common_length(data):
    """The number of examples. Raises `ValueError` that lists the lengths where they differ."""
    lengths = {n: leaf.shape[0] for n, leaf in leaves(data)}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{n}: {length}" for n, length in lengths.items())
        raise ValueError(f"All arrays must have the same number of examples. Got {given}.")
    if not lengths:
        raise ValueError("There are no data: `x` is None. Expected arrays, a dataset, a generator or a loader.")
    return int(next(iter(lengths.values())))


def leaves(data):
    """`(name, array)` of what `pack_x_y_sample_weight` gave."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

    def walk(name, part):
        if isinstance(part, dict):
            for key, value in part.items():
                yield from walk(f"{name}/{key}", value)
        elif isinstance(part, list | tuple):
            for i, value in enumerate(part):
                yield from walk(f"{name}/{i}", value)
        elif part is not None:
            yield name, part

    for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        yield from walk(name, part)


def weighing(class_weight):
    """A function that gives a batch the sample weights that its targets' classes have."""
    if not isinstance(class_weight, dict):
        raise ValueError(f"class_weight must be a dict from class index to weight, got {class_weight!r}.")
    known = {0: 1.0, **class_weight}
    labels = np.array(sorted(known))
    table = np.array([known[label] for label in sorted(known)], keras.config.floatx())

    def transform(data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is None or isinstance(y, dict | list | tuple):
            raise ValueError("class_weight needs one target with a class for every example.")
        if sample_weight is not None:
            raise ValueError("Give either class_weight or sample_weight, not both.")
        classes = classes_of(y)
        if isinstance(y, np.ndarray):
            place = np.minimum(np.searchsorted(labels, classes), len(labels) - 1)
            weights = np.where(labels[place] == classes, table[place], 1).astype(table.dtype)
        else:
            classes = tf.cast(classes, labels.dtype)
            place = tf.minimum(tf.searchsorted(labels, tf.reshape(classes, [-1])), len(labels) - 1)
            place = tf.reshape(place, tf.shape(classes))
            weights = tf.where(tf.gather(labels, place) == classes, tf.gather(table, place), tf.ones((), table.dtype))
        return keras.utils.pack_x_y_sample_weight(x, y, weights)

    return transform


def classes_of(y):
    """The class of every example, as Keras reads it: of one-hot rows the largest, of numbers the nearest integer."""
    on_host = isinstance(y, np.ndarray)
    if len(y.shape) > 1 and y.shape[-1] != 1:
        return y.argmax(-1) if on_host else tf.argmax(y, -1)
    if len(y.shape) > 1:
        y = y[..., 0]
    if on_host:
        return np.round(y).astype("int32")
    return tf.cast(tf.round(tf.cast(y, tf.float64)), tf.int32)


def check_count(name, value):
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
        raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more.")


def split(x, y, sample_weight, share):
    """Divides arrays into a training part and a validation part, the last `share` of the examples."""
    if not 0 < share < 1:
        raise ValueError(f"validation_split={share!r}: expected a number between 0 and 1.")
    if isinstance(x, tf.data.Dataset | keras.utils.PyDataset) or is_iterable_of_batches(x):
        raise ValueError(f"validation_split is for arrays, not for a {type(x).__name__}: give validation_data.")
    parts = [
        None if p is None else standard_arrays(p, n) for p, n in ((x, "x"), (y, "y"), (sample_weight, "sample_weight"))
    ]
    total = common_length(keras.utils.pack_x_y_sample_weight(*parts))
    at = int(total * (1 - share))
    if at in (0, total):
        raise ValueError(f"validation_split={share!r} of {total} examples leaves one of the two parts empty.")
    first = [tf.nest.map_structure(lambda a: None if a is None else part_of(a, 0, at), p) for p in parts]
    last = [tf.nest.map_structure(lambda a: None if a is None else part_of(a, at, total), p) for p in parts]
    return first, last


def part_of(array, start, end):
    return picked(array, np.arange(start, end)) if isinstance(array, tf.SparseTensor) else array[start:end]
