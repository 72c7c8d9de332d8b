"""The row: the scalars of a step as one vector, each under its final name."""

import dataclasses

import keras
import tensorflow as tf

from tfloop import _keras, names, statistics, terms
from tfloop.loop.record import Column, Layout, Result, count_of


class NameBook:
    """Gives every scalar of a step its name.

    What is fixed (the loss, its parts, what a step returned) keeps its name. A metric that clashes with it is
    shown as `<owner's path or the model's name>/<name>`, and so are the metrics of layers that share a name.
    """

    def __init__(self, model, qualified):
        self._model = model
        self._qualified = qualified
        self._fixed = {}  # name -> (Column or Result, value)
        self._metrics = []  # (name, owner, Column or Result, value)
        self._watched = []  # (Column, value)

    def names(self):
        return list(self._fixed)

    def all_names(self):
        return list(self._named())

    def fixed(self, name, entry, value):
        self._fixed.setdefault(name, (entry, value))

    def metric(self, name, owner, entry, value):
        self._metrics.append((name, owner, entry, value))

    def watched(self, column, value):
        self._watched.append((column, value))

    def row(self, size, notes):
        """The scalars as one vector, with the batch size in front, and their `Layout`."""
        columns, results, values = [], [], []
        named = self._named()
        for name, (entry, value) in named.items():
            entry = dataclasses.replace(entry, name=name)
            if isinstance(entry, Result):
                results.append(entry)
                if entry.count is not None:
                    results.append(Result(count_of(name), entry.count))
                own = value
            else:
                columns.append(entry)
                value, own = value if isinstance(value, tuple) else (value, None)
                values.append(value)
            if isinstance(own, Count):
                columns.append(Column(count_of(name), "count"))
                values.append(own.value)
            elif own is not None:
                columns.append(Column(name, "step"))
                values.append(own)
        order = tuple(n for n, (entry, _) in named.items() if getattr(entry, "width", 1) == 1)
        dtype = tf.float64 if any(v.dtype == tf.float64 for v in values) else tf.float32
        parts = [tf.reshape(tf.cast(size, dtype), [1])]
        parts += [tf.reshape(tf.cast(v, dtype), [c.width]) for c, v in zip(columns, values, strict=True)]
        return tf.concat(parts, 0), Layout(tuple(columns), tuple(results), order, tuple(notes))

    def _named(self):
        named = dict(self._fixed)
        for name, owner, entry, value in self._metrics:
            key = self._qualified(name, owner) if self._clashes(name, owner) else name
            named[names.unique(key, named)] = (entry, value)
        for column, value in self._watched:
            named[names.unique(column.name, named)] = (column, value)
        return named

    def _clashes(self, name, owner):
        owners = [other for n, other, _, _ in self._metrics if n == name]  # and those of metrics that this step lacks
        owners += [layer for _, layer in names.walk(self._model) if name in terms.term_metrics(layer)]
        return name in self._fixed or (owner is not self._model and any(other is not owner for other in owners))


def expected_names(model):
    """The names of what an evaluation will return, as far as they are known before there is one.

    What `call` adds is known after its first step, what `watch` finds when there is an evaluation.
    """
    paths = {id(layer): path for path, layer in names.walk(model)}
    qualified = lambda name, owner: f"{paths[id(owner)] or model.name}/{name}"
    book = NameBook(model, qualified)
    parts = _expected_losses(model, qualified)
    for name in ("loss", *(parts if len(parts) > 1 else ()), *_keras.compiled_metric_names(model)):
        book.fixed(name, Column(name), None)
    compiled = _keras.compiled_metrics(model)
    for _, layer in names.walk(model):
        own = _keras.own_metrics(layer) if isinstance(layer, keras.layers.Layer) else []
        for name in (*(m.name for m in own if not any(m is c for c in compiled)), *terms.term_metrics(layer)):
            book.metric(name, layer, Column(name), None)
    return book.all_names()


def _expected_losses(model, qualified):
    outputs = _keras.compiled_loss_names(model)
    compiled = [] if model.loss is None else outputs if len(outputs) > 1 else ["compiled_loss"]
    added = [(t.name, owner) for _, owner in names.walk(model) for t in terms.losses_from_outside(owner)]
    named = [(name, owner) for name, owner in added if name is not None]
    taken = {"loss", "other_losses", *compiled, *_keras.compiled_metric_names(model)}
    all_names = [name for name, _ in named]
    shown = [qualified(n, owner) if n in taken or all_names.count(n) > 1 else n for n, owner in named]
    others = len(named) < len(added) or _keras.has_regularizer(model)
    return [*compiled, *dict.fromkeys(shown), *(["other_losses"] if others else [])]


def flat_logs(logs):
    """`(name, value)` of what a step returned. Raises `TypeError` if it is no dict."""
    if logs is None:
        return
    if not isinstance(logs, dict):
        raise TypeError(
            f"A step must return a dict of names and scalars, got {type(logs).__name__}: {logs!r}. "
            'For example: return {"loss": loss}.'
        )
    for name, value in logs.items():
        if isinstance(value, dict):
            yield from flat_logs(value)
        elif value is not None:
            yield name, value


@dataclasses.dataclass(frozen=True)
class Count:
    """Stands beside a step's value that may be one of no elements: 1, or 0 if it is."""

    value: tf.Tensor


def combined(values, aggregation, name):
    """The step's value of a metric that was added once or several times: over all elements of all values.

    With its `Count`, where only the step knows if there are any elements.
    """
    tensors = [as_float(terms.as_number(v, f"metric {name!r}")) for v in values]
    value = reduced(tensors, aggregation)
    told = not tf.executing_eagerly()  # by the shape, for all steps
    if aggregation == "sum" or any(t.shape.rank == 0 or (told and t.shape.num_elements()) for t in tensors):
        return value
    size = tf.add_n([tf.size(t) for t in tensors])
    return value, Count(tf.cast(size > 0, tf.float32))


def reduced(tensors, aggregation):
    """The value of float tensors: over all elements of all of them."""
    if aggregation == "last":
        return tf.reduce_mean(tensors[-1])
    if aggregation in ("min", "max"):
        reduce = statistics.EXTREMES[aggregation]
        return reduce(tf.stack([reduce(t) for t in tensors]))
    if len(tensors) == 1 and tensors[0].shape.rank == 0:
        return tensors[0]
    total = tf.add_n([tf.reduce_sum(t) for t in tensors])
    if aggregation == "sum":
        return total
    return total / tf.cast(tf.add_n([tf.size(t) for t in tensors]), total.dtype)


def mean(value, name):
    return reduced([as_float(terms.as_number(value, f"metric {name!r}"))], "mean")


def as_float(tensor):
    """Float32, unless it is float64: metrics are never less than float32."""
    return tensor if tensor.dtype in (tf.float32, tf.float64) else tf.cast(tensor, tf.float32)


def is_numeric(tensor):
    return tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool


def results_of(metric):
    """The `Result`s of a metric object; one of each key where it gives a dict."""
    count = (lambda: metric.count) if isinstance(metric, terms.TermMetric) else None
    return [Result(own_key(metric, path), reader(metric, path), count) for path, _ in _keras.leaves(metric.result())]


def own_key(metric, path):
    """The name of a metric object's result, or of what lies at `path` in it."""
    return path[-1] if path else metric.name


def reader(metric, path):
    def read():
        found = dict(_keras.leaves(metric.result()))[path]
        return mean(found, metric.name)

    return read


def merged(rows):
    """One row of the `(row, layout)` of several batches that made one update, and its layout.

    The last batch has the names that only an update has (gradients); the others are taken over all batches.
    """
    if len(rows) == 1:
        return rows[0]
    layout = rows[-1][1]
    places = [{column.name + column.aggregation: place for column, place in each.slices()} for _, each in rows]
    sizes = tf.stack([row[0] for row, _ in rows])
    parts = [tf.reduce_sum(sizes)[None]]

    def stacked(key, having):  # (batches, width)
        return tf.stack([rows[i][0][places[i][key]] for i in having])

    for column, _ in layout.slices():
        key, count = column.name + column.aggregation, count_of(column.name) + "count"
        having = [i for i, place in enumerate(places) if key in place]
        weights = tf.gather(sizes, having)[:, None]
        weights = tf.where(tf.reduce_any(weights > 0), weights, 1)  # of batches that all repeat another replica's
        if all(count in places[i] for i in having):
            weights *= stacked(count, having)
        parts.append(over_batches(column, stacked(key, having), weights))
    return tf.concat(parts, 0), layout


def over_rows(rows, layout):
    """One row of those of several parts of a batch, `(parts, width)`, that have one layout."""
    sizes = rows[:, 0]
    parts = [tf.reduce_sum(sizes)[None]]
    counts = {column.name: rows[:, place] for column, place in layout.slices() if column.aggregation == "count"}
    for column, place in layout.slices():
        weights = sizes[:, None] * counts.get(count_of(column.name), 1)
        parts.append(over_batches(column, rows[:, place], weights))
    return tf.concat(parts, 0)


def over_batches(column, values, weights):
    """The value of a column, `(width,)`, of those of several batches, `(batches, width)`, with their sizes."""
    if column.aggregation in ("mean", "step"):
        return tf.reduce_sum(tf.where(weights > 0, values * weights, 0), 0) / tf.reduce_sum(weights)
    if column.aggregation == "count":
        return tf.reduce_max(values, 0)
    if column.aggregation in ("last", "running"):
        return values[-1]
    if column.aggregation == "sum":
        return tf.reduce_sum(tf.where(weights > 0, values, 0), 0)  # of size 0: one that repeats another
    return statistics.EXTREMES[column.aggregation](values, 0)
