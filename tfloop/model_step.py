"""What one step of a model gathers, and the row it becomes.

The step hears the layers (through a `Recorder`), the losses and metrics that `call` adds, the updates of
optimizers and of metric objects. At its end the registry's metrics and watches are computed, and every
scalar gets its name, in the order in which names are shown.
"""

import contextlib

import keras
import tensorflow as tf

from tfloop import _keras, names, terms
from tfloop.loop.record import Column, Result
from tfloop.row import NameBook, combined, flat_logs, is_numeric, mean, own_key, reader, results_of
from tfloop.step import Step, current_step
from tfloop.tensors import Lazy, MissingTensor, Recorder, Tensors, current_graph, flatten, recorders, recording

ABSENT = object()
_AFTER = "gradients and updates exist after the backward pass: a metric can have them, a loss cannot."


class ModelStep(Step):
    """One training or evaluation step of one model.

    Args:
        model: the `tfloop.Model`.
        kind: `"train"`, `"test"` or `"predict"`.
        data: the batch, as `train_step` gets it.
        updates: int64 scalar, the number of completed updates.
        accumulation: an `Accumulation`, where this batch is one of several that make an update together.
        part: a `Part`, where the batch is what one of several replicas has of it.
    """

    def __init__(self, model, kind, data, updates, accumulation=None, part=None):
        super().__init__(kind)
        self._accumulation, self.part = accumulation, part
        if part is not None:
            self.uncompilable.append("a distribution strategy runs it on replicas")
        self._memo = accumulation.memo if accumulation else self._memo  # what happens once, once in all of them
        self._ends = accumulation is None or accumulation.at_the_last()  # with an update, and its gradients
        self.model = model
        self.updates = updates
        self.size = batch_size_of(data)
        self.recorder = Recorder(model)
        self.loss = None  # what the model's own training step minimised
        self.computed_loss = None  # what `compute_loss` gave last
        self.loss_parts = {}  # name -> scalar, as they enter the loss
        self.losses_read = None  # what `model.losses` gave last
        self._registry_losses = []  # (scalar tensor, name, owner), as evaluated last
        self._data = data
        self._added_losses = []  # (scalar tensor, name, owner)
        self._added_metrics = {}  # (id(owner), name) -> (owner, name, aggregation, values)
        self._updated = []  # metric objects updated in this step
        self._own_sums = {}  # id(metric object) -> (total, count) of this step alone
        self._handed_over = []  # those whose results were given to add_metric
        self._returned = []  # those whose results a user's step returned: they are shown under its names
        self._trained = model._tfloop_terms.trained
        self._paths = {id(layer): path for path, layer in names.walk(model)}
        self._gradients, self._old_weights, self._new_weights = {}, {}, {}
        self.applied = []  # gradients that went into updates, but for those that a loss scale looks after
        self.written = []  # variables of updates whose gradients cannot be seen from here
        self._graph = current_graph()

    # What the step hears while it runs.

    def note_loss(self, tensor, name, owner):
        self._added_losses.append((tensor, name, owner))

    def note_metric(self, owner, name, aggregation, value):
        if self.kind == "predict" or self.recorder.probing or self.recorder not in recorders():
            return
        if getattr(value, "graph", self._graph) is not self._graph:
            # Made inside a tf.while_loop or tf.cond: the value cannot leave it, a variable's update can.
            metric = terms.term_metric(owner, name, aggregation)
            _keras.mark_results(metric)
            with self.note_update(metric):
                metric.accumulate(value, self.size)
            return
        entry = self._added_metrics.setdefault((id(owner), name), (owner, name, aggregation, []))
        entry[-1].append(value)

    def of_the_batch(self, gradients, weighted=False):
        """The gradients of the whole batch, where this step has one replica's part of it."""
        return gradients if self.part is None else self.part.reduced(gradients, weighted)

    def _of_the_update(self, optimizer, gradients, variables):
        """The gradients with which an optimizer is to make its update; `None` if it is to make none yet."""
        gradients = self.of_the_batch(gradients)
        return gradients if self._accumulation is None else self._accumulation(optimizer, gradients, variables)

    def note_apply(self, optimizer, gradients, variables):
        """Keeps the unscaled gradients and the old values of the variables of one update."""
        if variables is None:
            variables = optimizer._trainable_variables
        scale = _keras.gradient_scale(optimizer)
        looked_after = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        for gradient, variable in zip(gradients, variables, strict=False):
            if gradient is None:
                continue
            if not looked_after and getattr(gradient, "graph", self._graph) is self._graph:
                self.applied.append(gradient)
            elif not looked_after:  # within a tf.function, tf.cond or tf.while_loop: what became of it can be seen
                self.written.append(variable)
            self._gradients[id(variable)] = Lazy(lambda g=gradient: unscaled(dense(g), scale))
            self._old_weights.setdefault(id(variable), read(variable))

    def unseen_updates(self):
        """The values of variables whose gradients could not be seen: of all that is trained, if none was."""
        if not self._ends:  # one of several batches that make an update together, and not the last
            return []
        seen = self._gradients or self.written
        return [read(v) for v in (self.written if seen else self.model.trainable_variables)]

    @contextlib.contextmanager
    def note_update(self, metric):
        """Around the update of a metric object. A mean shows what this step alone adds to it, if that is wanted."""
        if not self._was_updated(metric):
            self._updated.append(metric)
        if metric is _keras.loss_tracker(self.model):
            self.model.__dict__["_tfloop_tracks_loss"] = True
        here = current_graph() is self._graph
        if not (here and self.model._tfloop_measures_each_step and is_plain_mean(metric)):
            yield
            return
        variables = (metric.total, metric.count)
        before = [read(v) for v in variables]
        for variable in variables:
            variable.assign(tf.zeros_like(before[0]))
        yield
        added = [read(v) for v in variables]
        for variable, old, new in zip(variables, before, added, strict=True):
            variable.assign(old + new)
        earlier = self._own_sums.get(id(metric), (0.0, 0.0))
        self._own_sums[id(metric)] = [a + b for a, b in zip(earlier, added, strict=True)]

    def _own_value(self, metric):
        """A metric object's value over this step alone, where it is known."""
        sums = self._own_sums.get(id(metric))
        return None if sums is None else tf.math.divide_no_nan(*sums)

    def _was_updated(self, metric):
        return any(metric is m for m in self._updated)

    def note_handed_over(self, metric):
        self._handed_over.append(metric)

    # What losses and metrics see.

    def batch(self):
        x, y, sample_weight = unpack(self._data)
        found = [*flatten("x", x), *flatten("y", y), *flatten("sample_weight", sample_weight)]
        found += flatten("y_pred", self.recorder.output)
        return dict(found)

    def loss_tensors(self):
        reasons = {**self.recorder.reasons, "gradients/": _AFTER, "updates/": _AFTER}
        reasons["losses/"] = "a loss is part of them: a metric can have them, a loss cannot."
        reasons |= _absent_batch(self._data)
        return Tensors({**self.batch(), **self.recorder.values, **self._weights()}, reasons)

    def metric_tensors(self):
        by_id = {id(v): name for name, v in names.weight_names(self.model).items()}
        values = {**self.batch(), **self.recorder.values}
        values |= {f"losses/{name}": value for name, value in self.loss_parts.items()}
        values |= self._weights()
        reasons = {**self.recorder.reasons, **_absent_batch(self._data)}
        variables = {id(v): v for v in names.weight_names(self.model).values()}
        for key, gradient in self._gradients.items():
            if key in by_id:
                values[f"gradients/{by_id[key]}"] = gradient
        for key, old in self._old_weights.items():
            if key in by_id:
                values[f"updates/{by_id[key]}"] = Lazy(lambda k=key, o=old: read(variables[k]) - o)
        if not self.training:
            reasons["gradients/"] = reasons["updates/"] = "there is no backward pass in evaluation."
        else:
            reasons["gradients/"] = reasons["updates/"] = (
                "no loss reaches this weight, or the update did not go through `minimize` or an optimizer's `apply`."
            )
        return Tensors(values, reasons)

    def _weights(self):
        found = {}
        for name, variable in names.weight_names(self.model).items():
            old = self._old_weights.get(id(variable))
            found[f"weights/{name}"] = old if old is not None else Lazy(lambda v=variable: read(v))
        return found

    # Losses.

    def registry_losses(self):
        """The weighted values of the losses registered on the model and on tfloop models inside it."""
        found = []
        tensors = self.loss_tensors()
        for path, owner in self._owners():
            view = tensors.below(path)
            for term in terms.registry(owner).losses:
                value = self._evaluate(term, view)
                if value is not ABSENT:
                    value = terms.mean_scalar(value, f"loss {term.name or terms.label(term.value)!r}")
                    found.append((terms.weighted(value, term.weight, self.updates), term.name, owner))
        self._registry_losses = found
        return [tensor for tensor, _, _ in found]

    def named_losses(self, tensors, taken=("loss", "other_losses")):
        """Splits loss tensors into `{name: sum}` of the named ones and a list of the others.

        Where layers share a name, or it is `taken` or a compiled metric's, it is shown below its owner.
        """
        known = {id(t): (name, owner) for t, name, owner in (*self._added_losses, *self._registry_losses)}
        entries, others = {}, []  # (name, id of the owner) -> (owner, tensors)
        for tensor in tensors:
            name, owner = known.get(id(tensor), (None, None))
            if name is None:
                others.append(tensor)
            else:
                entries.setdefault((name, id(owner)), (owner, []))[1].append(tensor)
        taken = {*taken, *_keras.compiled_metric_names(self.model)} if entries else taken
        all_names = [name for name, _ in entries]
        named = {}
        for (name, _), (owner, parts) in entries.items():
            shared = all_names.count(name) > 1 or name in taken
            key = self._qualified(name, owner) if shared else name
            named[names.unique(key, {*taken, *named})] = terms.total(parts)
        return named, others

    def current_losses(self):
        """The losses that the step read of the model; if it read none, those that the model has now."""
        if self.losses_read is None and self._added_losses:
            self.losses_read = self.model.losses
        return self.losses_read or []

    # The row.

    def row(self, returned, lazily):
        """The step's scalars as one float vector, and the layout that says what they are.

        Args:
            returned: what `train_step` or `test_step` gave: a dict, possibly nested, or `None`.
            lazily: whether results of metric objects are read once a chunk, and those that the step did not
                return are shown too: true for the model's own step, false for a user's.
        """
        book = NameBook(self.model, self._qualified)
        for name, value in self._loss_entries():
            book.fixed(name, Column(name), value)
        parts = book.names()
        for name, value in self._returned_entries(returned, lazily):
            book.fixed(self._qualified(name, self.model) if name in parts else name, *value)
        if self.loss is None:
            named, _ = self.named_losses(self.current_losses(), book.names())
            for name, value in named.items():
                book.fixed(name, Column(name), value)
        for path, owner in names.walk(self.model):
            if isinstance(owner, keras.layers.Layer):
                for name, entry, value in self._metrics_of(path, owner, lazily):
                    book.metric(name, owner, entry, value)
        for column, value in self._watched():
            book.watched(column, value)
        return book.row(self.size, self.uncompilable)

    def _loss_entries(self):
        if self.loss is None:
            return
        yield "loss", self.loss
        if len(self.loss_parts) > 1:
            yield from self.loss_parts.items()

    def _returned_entries(self, returned, lazily):
        """`name, (Column, value)` or `name, (Result, None)` for what the user's or our own step returned."""
        for name, value in flat_logs(returned):
            metric, path = _keras.metric_of(value) or (None, ())
            if isinstance(metric, terms.TermMetric) or (self.loss is not None and name == "loss"):
                continue  # these have columns of their own
            if self.loss is not None and any(metric is m for m in _keras.compiled_output_losses(self.model)):
                if name in self.loss_parts or not self._was_updated(metric):
                    continue
            if metric is not None and metric is _keras.loss_tracker(self.model) and not self._was_updated(metric):
                if self.computed_loss is not None:  # a step that leaves the tracker at 0 means the loss it computed
                    yield name, (Column(name), self.computed_loss)
                continue
            if metric is not None and lazily:
                if name != own_key(metric, path) or not self._is_attribute(metric):
                    yield name, (Result(name, reader(metric, path)), self._own_value(metric))
            elif metric is not None and self.part is not None:  # a running value of all replicas together
                self._returned.append(metric)
                yield name, (Result(name, reader(metric, path)), self._own_value(metric))
            elif metric is not None:
                self._returned.append(metric)
                if name == own_key(metric, path):  # updated since, it may be: Keras reads those again, by name
                    value = reader(metric, path)()
                yield name, (Column(name, "running"), (mean(value, name), self._own_value(metric)))
            else:
                yield name, (Column(name), combined([value], "mean", name))

    def _is_attribute(self, metric):
        return any(metric is m for _, layer in names.walk(self.model) for m in _keras.own_metrics(layer))

    def _metrics_of(self, path, owner, lazily):
        """`(name, Column or Result, value)` of the metrics that belong to one layer, or to the model itself."""
        for metric in _keras.own_metrics(owner):
            if self._shows(metric, lazily):
                own = self._own_value(metric)
                yield from ((result.name, result, own) for result in results_of(metric))
        registered = {term.name: term for term in terms.registry(owner).metrics}
        tensors = self.metric_tensors() if registered else None
        view = tensors.below(path) if registered else None
        for name, metric in terms.term_metrics(owner).items():
            if name in registered:
                value = self._evaluate(registered[name], view)
                if value is not ABSENT:
                    term = registered[name]
                    yield name, Column(name, term.aggregation), combined([value], term.aggregation, name)
            elif (id(owner), name) in self._added_metrics:
                _, _, aggregation, values = self._added_metrics[id(owner), name]
                yield name, Column(name, aggregation), combined(values, aggregation, name)
            elif self._was_updated(metric):
                yield from ((result.name, result, None) for result in results_of(metric))

    def _shows(self, metric, lazily):
        """Metric objects that were not updated in the step are left out, rather than shown as 0."""
        updated = self._was_updated(metric)
        if any(metric is m for m in self._returned):
            return False
        return updated and (lazily or any(metric is m for m in self._handed_over))

    def _evaluate(self, term, tensors):
        """The value of a registered term, or `ABSENT` in evaluation for one that only training has."""
        key = (type(term).__name__, term.name, id(term.value))
        try:
            value = terms.evaluate(term.value, tensors)
        except MissingTensor as missing:
            if missing.only_training and not (self.training and self._ends):
                return ABSENT  # of the backward pass, which evaluation and all but the last of several batches lack
            if self.training or key not in self._trained:
                raise
            return ABSENT
        if self.kind == "train":
            self._trained.add(key)
        return value

    def _watched(self):
        """`(Column, value)` for every statistic that is watched; those with one interval under one condition."""
        tensors = self.metric_tensors()
        due = {}  # every -> {key: (statistic, name of the tensor)}
        for path, owner in self._owners():
            full_names, view = tensors.names_below(path), tensors.below(path)
            for watch in terms.registry(owner).watches:
                found = view.matching(watch.pattern)
                if not found and self.training and self._ends:
                    raise ValueError(
                        f"watch({watch.pattern!r}) matches no tensor of the step. There is {names.listing(view, 60)}."
                    )
                every = watch.every if self.training else 1  # no updates are counted in evaluation
                for name in [full_names[n] for n in found if is_numeric(view[n])]:
                    key = f"{name}/{watch.statistic.name}"
                    if not any(key in known for known in due.values()):
                        due.setdefault(every, {})[key] = watch.statistic, name
        for every, entries in due.items():
            columns = [Column(key, s.aggregation, every, s.width) for key, (s, _) in entries.items()]

            def compute(entries=entries):
                return [measured(statistic, name, tensors[name]) for statistic, name in entries.values()]

            def skip(columns=columns):
                return [tf.fill([c.width] if c.width > 1 else [], float("nan")) for c in columns]

            values = compute() if every == 1 else tf.cond(self.updates % every == 0, compute, skip)
            yield from zip(columns, values, strict=True)

    def _owners(self):
        """`(path, model)` of the model and the tfloop models inside it that have terms."""
        return [(p, layer) for p, layer in names.walk(self.model) if terms.registry(layer)]

    def _qualified(self, name, owner):
        path = self._paths.get(id(owner), getattr(owner, "name", ""))
        return f"{path or self.model.name}/{name}"

    @contextlib.contextmanager
    def hearing(self):
        """Lets the step hear what happens in this thread: layers, updates of optimizers and of metrics."""
        for _, layer in names.walk(self.model):
            for metric in _keras.own_metrics(layer):
                _keras.mark_results(metric)
        for metric in (*_keras.compiled_metrics(self.model), *self.model.metrics):
            for part in (metric, *_keras.inner_metrics(metric)):
                _keras.mark_results(part)
        with (
            recording(self.recorder),
            _keras.observing_updates(self.note_update),
            _keras.observing_applies(self.note_apply, self._of_the_update),
        ):
            yield self


def model_step(model):
    """The `ModelStep` that runs in this thread, if it is one of this model."""
    step = current_step()
    return step if isinstance(step, ModelStep) and step.model is model else None


def measured(statistic, name, tensor):
    """A statistic of a tensor. Raises `ValueError` for one, of a user's, that gives no scalar."""
    value = tf.cast(statistic(tensor), tf.float32)
    if statistic.width == 1 and value.shape.rank not in (0, None):
        raise ValueError(
            f"The statistic {statistic.name!r} of {name!r} gave a tensor of shape {tuple(value.shape)}. Expected a "
            "scalar: reduce it over all axes."
        )
    return value


def is_plain_mean(metric):
    """Whether a metric object's result is its total by its count, so that a step's share of it is known."""
    return isinstance(metric, keras.metrics.Mean) and type(metric).result is keras.metrics.Mean.result


def dense(gradient):
    return tf.convert_to_tensor(gradient)  # sums what an IndexedSlices has for one row


def unscaled(gradient, scale):
    return gradient if scale is None else gradient / tf.cast(scale, gradient.dtype)


def read(variable):
    """The variable's value at this point of the step, in its own dtype whatever the autocast scope says."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return value.read_value() if isinstance(value, tf.Variable) else tf.convert_to_tensor(value)


def unpack(data):
    """`(x, y, sample_weight)`; a batch of another shape is all `x`, as the user's step makes of it what it will."""
    try:
        return keras.utils.unpack_x_y_sample_weight(data)
    except ValueError:
        return data, None, None


def _absent_batch(data):
    parts = dict(zip(("x", "y", "sample_weight"), unpack(data), strict=True))
    return {name: "the batch has none." for name, value in parts.items() if value is None}


def batch_size_of(data):
    """The number of examples in a batch: the first dimension of its first tensor."""
    for leaf in keras.tree.flatten(data):
        if leaf is not None and getattr(leaf.shape, "rank", len(leaf.shape)) != 0:
            return tf.shape(leaf)[0]
    return tf.constant(1)
