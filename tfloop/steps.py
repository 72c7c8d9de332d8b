"""Steps: a model as the loop sees it, something that has steps, state and terms."""

import contextlib

import keras
import tensorflow as tf

from tfloop import _keras, names, operation, replicas, reproducibility, terms, weights
from tfloop.step import Step, running


class ModelSteps:
    """A model as the loop sees it: something that has steps, state and terms."""

    def __init__(self, model):
        self.model = model
        self._ran = set()
        self._built_by = set()  # kinds of steps of the user's own
        self._failed = {}  # kind -> why such a step could not be made before the model was built

    def run(self, kind, batch, compiled=False):
        """One step, run or traced, `compiled` by XLA or not. A first eager step that fails changes no variable."""
        if not tf.executing_eagerly() or (kind, self.version) in self._ran:
            with self.model.distribute_strategy.scope():
                return self.model._tfloop_run_step(kind, batch, compiled)
        variables = {**reproducibility.state_variables(self.model), **reproducibility.metric_variables(self.model)}
        before = reproducibility.snapshot(variables)
        try:
            with self.model.distribute_strategy.scope():
                result = self.model._tfloop_run_step(kind, batch)
        except Exception:
            reproducibility.assign(variables, before)
            raise
        self._ran.add((kind, self.version))
        return result

    def steps_first(self, kind):
        """Whether a step has to be made, and taken back, or traced, to build the model.

        Only a user's own step knows what it calls the layers with. On several devices variables are not made in a step.
        """
        own = self.model._tfloop_has_own_step(kind) and not self.replicated
        return own and not _keras.is_built(self.model) and kind not in self._built_by

    @contextlib.contextmanager
    def stepping_first(self, kind):
        """While such a step is made or traced. If it cannot be, it may yet when the model is built by a call."""
        averages, self.model.__dict__["_tfloop_averages"] = self.model._tfloop_averages, []  # they need variables
        changes = contextlib.ExitStack()
        if self.eager:
            changes.enter_context(self._taken_back())
        if self.eager or weights.are_waited_for(self.model):
            changes.enter_context(_keras.observing_applies(lambda *_: None, self._only_build))
        try:
            with changes, self.model.distribute_strategy.scope():
                yield
        except Exception as error:
            self._failed[kind] = error
        finally:
            self.model.__dict__["_tfloop_averages"] = averages
        self._built_by.add(kind)

    def build(self, batch, kind="train"):
        """Makes all variables, so that a step can be traced inside a loop. From specs, or a batch, if `needs_batch`."""
        model = self.model
        replicas.check(model)
        with model.distribute_strategy.scope():
            try:
                self._build(model, batch, kind)
            except Exception:
                if kind in self._failed:
                    raise self._failed[kind] from None
                raise
        replicas.check_variables(model)
        self._count_updates()

    def _build(self, model, batch, kind):
        with running(Step("build")), model._tfloop_trainable_as_compiled(), self._taken_back(self.needs_batch(kind)):
            if self._is_called(kind):
                _keras.build(model, batch)
            else:
                weights.apply_waiting(model)
                if model.optimizer is not None and not model.optimizer.built and model.trainable_variables:
                    model.optimizer.build(model.trainable_variables)
        with model._tfloop_trainable_as_compiled():
            for average in model._tfloop_averages:
                average.build(model)

    def needs_batch(self, kind):
        """Whether variables are made by calling the model: what is run eagerly need not be traceable."""
        return self.eager and self._is_called(kind) and not _keras.is_built(self.model)

    def _is_called(self, kind):
        """Whether the model is called with a batch's `x`. What a step of the user's own does, only that step knows."""
        known = not self.model._tfloop_has_own_step(kind) or kind in self._failed or self.replicated
        return known and type(self.model).call is not keras.Model.call

    @contextlib.contextmanager
    def _taken_back(self, really=True):
        """What happens to variables here is undone. Those made here are kept."""
        if not really:
            yield
            return
        variables = {**reproducibility.state_variables(self.model), **reproducibility.metric_variables(self.model)}
        variables |= reproducibility.process_variables(create=True)
        before = reproducibility.snapshot(variables)
        try:
            yield
        finally:
            reproducibility.assign(variables, before)

    def _count_updates(self):
        """An optimizer that has taken steps elsewhere, or was loaded, sets the count of updates."""
        optimizer = self.model.optimizer
        if optimizer is not None and optimizer.built:
            done = int(optimizer.iterations.numpy())
            if done > int(self.updates.numpy()):
                self.updates.assign(done)

    def build_optimizers(self, batch):
        """Builds the optimizers that a user's `train_step` builds when it first runs: runs it once, without updates."""

        with self._taken_back(), _keras.observing_applies(lambda *_: None, self._only_build):
            self.run("train", batch)

    def _only_build(self, optimizer, gradients, variables):
        """In the place of an update: builds the optimizer, if all weights are there. Leaves no gradients to apply."""
        if not optimizer.built and variables and not weights.are_waited_for(self.model):
            optimizer.build(variables)

    def build_for_prediction(self, batch):
        """Builds the layers alone: a batch to predict has no targets to build losses and metrics with."""
        model = self.model
        if model.built or not self._is_called("predict"):
            return
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        with model.distribute_strategy.scope(), running(Step("build")), self._taken_back(self.eager):
            call = model if self.eager else tf.function(model, autograph=False).get_concrete_function
            call(x)

    @property
    def seed(self):
        return reproducibility.current_seed() or 0

    @property
    def version(self):
        """Changes with whatever makes a step another one: terms, parametrisations, averages, what it has to say,
        the batches it takes apart."""
        told = self.guarded, self.model._tfloop_measures_each_step, self.micro_batch
        return (*terms.versions(self.model), *map(id, self.model._tfloop_averages), *told)

    @property
    def differs_when_compiled(self):
        """Whether a training step is traced in another way for XLA."""
        return bool(self.model._tfloop_averages)

    @property
    def replicated(self):
        """Whether a step runs on the devices of a distribution strategy."""
        return replicas.strategy_of(self.model) is not None

    @property
    def team(self):
        """The processes that train together."""
        return replicas.team_of(replicas.strategy_of(self.model))

    @property
    def eager(self):
        return bool(self.model.run_eagerly) or tf.config.functions_run_eagerly()

    @property
    def choices(self):
        return self.model._tfloop_choices

    @property
    def guarded(self):
        """Whether a training step says, in its row, if its numbers are not finite."""
        return self.model._tfloop_guarded

    @guarded.setter
    def guarded(self, flag):
        self.model.__dict__["_tfloop_guarded"] = flag

    @property
    def micro_batch(self):
        """The size of the batches of which several make one update; `None` where a batch makes one."""
        return self.model._tfloop_micro_batch

    @micro_batch.setter
    def micro_batch(self, size):
        self.model.__dict__["_tfloop_micro_batch"] = size

    @contextlib.contextmanager
    def undivided(self):
        """While single batches make an update each, whatever a fit gathers."""
        before, self.micro_batch = self.micro_batch, None
        try:
            yield
        finally:
            self.micro_batch = before

    @property
    def updates(self):
        return self.model._tfloop_updates

    def start(self):
        """Called before training."""
        for average in self.model._tfloop_averages:
            average.begin()

    def measure_each_step(self):
        """From now on the record has the values of compiled metrics over each step alone, too."""
        self.model.__dict__["_tfloop_measures_each_step"] = True

    def initial_epoch(self, given):
        """Where training begins: a callback may have restored a later epoch."""
        return _keras.restored_epoch(self.model) or given

    def finish(self):
        """Called after training: an optimizer with an average of its own puts that into the weights, as in Keras."""
        optimizer = self.model.optimizer
        if isinstance(optimizer, keras.optimizers.Optimizer) and optimizer.built:
            optimizer.finalize_variable_values(self.model.trainable_weights)

    def for_validation(self):
        """The context in which validation runs: with the averaged weights, if an average asks for it."""
        stack = contextlib.ExitStack()
        for average in self.model._tfloop_averages:
            stack.enter_context(average.for_validation(self.model))
        return stack

    def reset_metrics(self, but=()):
        """Resets all metric objects, also those that the user's own `reset_metrics` leaves out.

        `but`: those that the caller resets.
        """
        if not self.model._tfloop_resets_all_metrics:
            self.model.reset_metrics()
        left = {id(m) for m in but}
        for metric in self.model._tfloop_every_metric():
            if id(metric) not in left:
                metric.reset_state()

    def metrics_to_reset(self):
        """The metric objects that a graph can reset. None where a strategy keeps their variables on several devices."""
        if self.replicated:
            return []
        return [m for m in self.model._tfloop_every_metric() if terms.resets_its_variables(m)]

    def metric_variables(self):
        """The variables of all metric objects, on every device here."""
        return [c for m in self.model._tfloop_every_metric() for v in m.variables for c in replicas.copies(v)]

    def publisher(self):
        """A function of an epoch's values that sets the metric objects that stand for columns of the record."""
        found = [
            (name, path, metric)
            for path, layer in names.walk(self.model)
            for name, metric in terms.term_metrics(layer).items()
            if isinstance(metric, terms.TermMetric)
        ]
        everyone = [name for name, _, _ in found]
        metrics = []  # (its names in a log, metric); one of several that share a name is never shown by that alone
        for name, path, metric in found:
            alone = [name] if not path or everyone.count(name) == 1 else []
            metrics.append(([f"{path or self.model.name}/{name}", *alone], metric))
        tracker = None if self.model._tfloop_tracks_loss else _keras.loss_tracker(self.model)
        assign = keras.Variable.assign if self.replicated else lambda v, number: operation.assign(v.value, number)

        def publish(values):
            for logged, metric in metrics:
                value = next((values[name] for name in logged if name in values), None)
                if value is not None:
                    metric.record(value)
            if tracker is not None and values.get("loss") is not None:
                assign(tracker.total, values["loss"])
                assign(tracker.count, 1.0)

        return publish
