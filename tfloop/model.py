"""`tfloop.Model`: a `keras.Model` whose losses and metrics may be any tensor, trained by tfloop's loop.

One training step, in the order in which things happen: forward pass, losses, gradients, update, metrics.
"""

import contextlib
import functools
import inspect
import math
import warnings
from typing import cast

import keras
import tensorflow as tf

from tfloop import _keras, names, replicas, terms, weights
from tfloop.accumulation import Accumulation
from tfloop.averaging import WeightAverage, refuse_swapped
from tfloop.keeping import is_finite, losses, marked
from tfloop.layer import Adding, inside_call
from tfloop.loop import fitting
from tfloop.loop.accumulation import micro_batches
from tfloop.model_step import ModelStep, model_step
from tfloop.plain import plain_variable
from tfloop.row import expected_names, merged
from tfloop.step import current_step, running
from tfloop.steps import ModelSteps


class Default:
    """A property in whose place a user's own attribute of that name may stand."""

    def __init__(self, function):
        self._function, self.__doc__ = function, function.__doc__

    def __get__(self, instance, owner=None):
        return self if instance is None else self._function(instance)


class Model(Adding, keras.Model):
    """A `keras.Model` with losses and metrics on any tensor, and a loop of its own.

    Subclass it and write `call`, or give it the inputs and outputs of a functional model.

    ```python
    inputs = keras.Input((8,))
    hidden = layers.Dense(4, activation="relu", name="hidden")(inputs)
    model = tfloop.Model(inputs, layers.Dense(8)(hidden))
    model.add_loss(lambda t: ops.mean((t["y_pred"] - t["x"]) ** 2))
    model.add_metric(lambda t: ops.mean(t["hidden"] ** 2), name="power")
    model.compile(optimizer="adam")
    history = model.fit(np.ones((16, 8)), None, verbose=0).history
    assert list(history) == ["loss", "power"]
    ```

    To change a part of training override that part: `call`, `compute_loss`, `minimize`, `compute_metrics`, or
    the whole `train_step` as in Keras.
    """

    def __new__(cls, *args, **kwargs):
        if cls is Model and is_functional(args, kwargs):
            return FunctionalModel.__new__(FunctionalModel, *args, **kwargs)
        made = super().__new__(cls, *args, **kwargs)
        # Beside Keras' tracking: neither is a layer or a weight, and a model that is built may change them. What is
        # put on a user's model has names that no user would choose.
        made.__dict__["_tfloop_terms"] = terms.Terms()
        made.__dict__["_tfloop_updates"] = None
        made.__dict__["_tfloop_loop"] = None
        made.__dict__["_tfloop_as_compiled"] = {}
        made.__dict__["_tfloop_tracks_loss"] = False  # whether a step updates the compiled loss tracker itself
        made.__dict__["_tfloop_averages"] = []
        made.__dict__["_tfloop_running_average"] = None
        made.__dict__["_tfloop_measures_each_step"] = False
        made.__dict__["_tfloop_micro_batch"] = None
        made.__dict__["_tfloop_guarded"] = False
        made.__dict__["_tfloop_loss_scales"] = {}  # id(optimizer) -> what scales the loss for it
        return made

    def __init__(self, *args, **kwargs):
        if is_functional(args, kwargs):
            become_functional(type(self))
            FunctionalModel.__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)

    # Terms.

    def add_loss(self, value=None, name=None, weight=1.0, inputs=None):
        """Adds a loss to what is minimised.

        Args:
            value: inside `call` a tensor or number; on a functional model a symbolic tensor of its graph; from
                outside a function of the step's `Tensors` (or of nothing). Non-scalars are averaged, in value
                and gradient.
            name: str, under which the loss is logged as it enters the total (weighted). Unnamed losses are
                logged together as `other_losses`.
            weight: float; a scalar variable, which every step reads; or a function of the number of completed
                updates, a float32 scalar: 0 in the first step.
            inputs: taken for code written for Keras 2, and not used.

        Works as a decorator; may be called after `compile` and between two fits.

        Raises `ValueError` for an eager tensor outside `call`, and for a name that is taken.

        ```python
        model = tfloop.Model(x := keras.Input((4,)), layers.Dense(2, name="code")(x))

        @model.add_loss(name="size", weight=0.1)
        def size(t):
            return ops.mean(t["code"] ** 2)
        ```
        """
        if value is None and not inside_call():
            return lambda function: self.add_loss(function, name=name, weight=weight) or function
        if name is not None and not inside_call():
            self._tfloop_check_new_loss(name)
        super().add_loss(value, name=name, weight=weight, inputs=inputs)
        return value if callable(value) and not isinstance(value, keras.Variable) else None

    def _register_loss(self, value, name, weight):
        terms.takes_tensors(value)  # refuses a function of two arguments
        self._tfloop_terms.add_loss(value, name, weight)

    def _register_metric(self, value, name, aggregation):
        terms.takes_tensors(value)
        self._tfloop_check_new_metric(name)
        self._tfloop_terms.add_metric(value, name, aggregation)
        terms.term_metric(self, name, aggregation)

    def _tfloop_check_new_metric(self, name):
        """Two metrics of one name in one place: an attribute, a symbolic or a registered one has it already."""
        attributes, registered = (
            (m.name for m in _keras.own_metrics(self)),
            (t.name for t in self._tfloop_terms.metrics),
        )
        if name in (*attributes, *self._tfloop_symbolic_names("metric"), *registered):
            raise ValueError(terms.two_of_one_name(name))

    def _tfloop_check_new_loss(self, name):
        if name in (*self._tfloop_symbolic_names("loss"), *(term.name for term in self._tfloop_terms.losses)):
            raise ValueError(terms.two_losses_of_one_name(name))

    def _tfloop_symbolic_names(self, kind):
        return [extra["name"] for known, _, extra in self.__dict__.get("_tfloop_symbolic", ()) if known == kind]

    def watch(self, pattern, statistic="rms", every=1):
        """Logs a statistic of every tensor whose name matches, as `<tensor>/<statistic>`.

        Args:
            pattern: `fnmatch` pattern of names. A bare `*` means layer outputs and tags; begin with
                `gradients/`, `weights/`, `updates/` or `losses/` for those.
            statistic: one of `mean rms norm min max std abs_mean zeros nonfinite histogram`, or a registered one.
            every: int, computed in steps 0, every, 2 * every, ... of training; in evaluation in every step.

        Raises `ValueError` for an unknown statistic at once, and for a pattern without a match when the step is
        traced.

        ```python
        model = tfloop.Model(x := keras.Input((4,)), layers.Dense(2, name="code")(x))
        model.watch("*", "rms")
        model.watch("gradients/*/kernel", "norm", every=10)
        ```
        """
        self._tfloop_terms.watch(pattern, statistic, every)

    def _tfloop_warn_of_functions(self):
        """Says what a file does not hold."""
        found = [
            term.name or terms.label(term.value) for term in (*self._tfloop_terms.losses, *self._tfloop_terms.metrics)
        ]
        if found:
            warnings.warn(
                f"{self.name!r} has losses or metrics that are functions of the step's tensors, and a file does not "
                f"hold them: {names.listing(found)}. Add them again to the loaded model, if its constructor does not.",
                stacklevel=3,
            )

    def __deepcopy__(self, memo):
        """A copy by way of a file, as Keras makes it, with the functions that a file does not hold."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* functions of the step's tensors")
            make, arguments = cast(tuple, self.__reduce__())
            copied = memo[id(self)] = make(*arguments)
        copies = dict(names.walk(copied))
        for path, source in names.walk(self):
            if isinstance(source, Model) and isinstance(copies.get(path), Model):
                copies[path]._tfloop_take_functions(source)
        return copied

    def _tfloop_take_functions(self, source):
        """Takes the terms of another model that are functions, but for those that are here already."""
        for term in source._tfloop_terms.losses[len(self._tfloop_terms.losses) :]:
            self._tfloop_terms.add_loss(term.value, term.name, term.weight)
        for term in source._tfloop_terms.metrics[len(self._tfloop_terms.metrics) :]:
            self._register_metric(term.value, term.name, term.aggregation)
        self._tfloop_terms.watches.extend(
            w for w in source._tfloop_terms.watches if w not in self._tfloop_terms.watches
        )
        self._tfloop_terms.version += 1

    # Weights.

    def parametrize(self, pattern, parametrization):
        """Parametrises every weight whose path matches: it is normalised before use, from now on.

        Args:
            pattern: `fnmatch` pattern of weight paths (`"discriminator/*/kernel"`), or of variable names.
            parametrization: a `tfloop.Parametrization`, its name, a function, or a list of them.

        Returns the paths it matched; on a model that is not built, an empty list, and it applies at build.

        Raises `ValueError` when nothing matches, with the weights there are.

        ```python
        model = tfloop.Model(x := keras.Input((4,)), layers.Dense(2, name="code")(x))
        assert model.parametrize("*/kernel", tfloop.SpectralNorm()) == ["code/kernel"]
        np.testing.assert_allclose(np.linalg.norm(model.effective_weights()["code/kernel"], 2), 1.0, rtol=1e-2)
        ```
        """
        found = weights.parametrize(self, pattern, parametrization)
        self._tfloop_terms.version += 1
        return found

    def effective_weights(self):
        """`path -> tensor` of what the forward pass uses for every parametrised weight."""
        return weights.effective_weights(self)

    def get_build_config(self):
        """As in Keras, with what the model was parametrised with: a class's own `get_config` does not say it."""
        if not isinstance(self, FunctionalModel):  # which warns in its own `get_config`
            self._tfloop_warn_of_functions()
        config = super().get_build_config()
        try:
            parametrizations = weights.parametrization_config(self) if config else []
        except ValueError as error:
            warnings.warn(
                f"A file of {self.name!r} does not say how it was parametrised: {error} Parametrise the loaded model "
                "again, if its constructor does not.",
                stacklevel=2,
            )
            return config
        return {**config, "parametrizations": parametrizations} if parametrizations else config

    def build_from_config(self, config):
        """Builds the model, and parametrises it, as `get_build_config` says."""
        config = dict(config or {})
        parametrizations = config.pop("parametrizations", ())
        super().build_from_config(config)
        if parametrizations:
            self.built = True  # as Keras says next: the weights are there, and a file's are read next
            weights.restore_parametrizations(self, parametrizations)

    # One step.

    def train_step(self, data):
        """One training step on a batch `x`, `(x, y)` or `(x, y, sample_weight)`. Returns the metrics' results."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self._tfloop_forward(x, training=True)
            loss = self._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
        self._tfloop_note_loss(loss)
        if self.trainable_variables:
            self.minimize(loss, self.trainable_variables, tape=tape)
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def test_step(self, data):
        """One evaluation step on a batch. Returns the metrics' results."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = self._tfloop_forward(x, training=False)
        loss = self._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=False)
        self._tfloop_note_loss(loss)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _tfloop_forward(self, x, training):
        # Given also where `call` does not name it: layers inside hear of it by Keras' call context. Keras' own step
        # leaves it out there, and then Dropout and BatchNormalization do not train.
        return self(x, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The total loss: the compiled loss, the added and registered ones, and regularisers, as a scalar.

        Its parts are logged one by one as soon as there are several.

        Raises `ValueError` when there is no loss at all.
        """
        del x, training
        compiled = self._tfloop_compiled_losses(y, y_pred, sample_weight)
        step = model_step(self)
        taken = ("loss", "other_losses", *compiled)
        named, others = ({}, self.losses) if step is None else step.named_losses(self.losses, taken)
        parts = {**compiled, **named}
        if others:
            parts["other_losses"] = terms.total([terms.mean_scalar(v, "an added loss") for v in others])
        if not parts:
            if step is None:
                return tf.zeros(())
            raise ValueError(
                "There is no loss to minimise. Give one to compile(loss=...), or add one: "
                "model.add_loss(lambda t: ...), or self.add_loss(...) inside `call`."
            )
        total = terms.total(parts.values())
        if step is not None:
            step.loss_parts, step.computed_loss = parts, total
        return total

    def _tfloop_compiled_losses(self, y, y_pred, sample_weight):
        if self._compile_loss is None:
            return {}
        if y is None and self.loss is not None and keras.tree.flatten(y_pred):
            raise ValueError(
                "compile(loss=...) needs targets, but `y` is None. Give `fit` targets, or leave `loss` out and add "
                "a loss that needs none: model.add_loss(lambda t: ...)."
            )
        with _keras.separate_output_losses(self) as outputs:
            total = self._compile_loss(y, y_pred, sample_weight)
        if total is None:
            return {}
        if len(outputs) < 2:
            return {"compiled_loss": tf.convert_to_tensor(total)}
        found = {}
        for name, value in outputs:
            found[names.unique(f"{name}_loss", found)] = tf.convert_to_tensor(value)
        return found

    def _tfloop_note_loss(self, loss):
        """Keeps the loss and its parts for the record, what an overridden `compute_loss` added as a rest."""
        step = model_step(self)
        if step is None:
            return
        loss = terms.mean_scalar(loss, "the loss")
        step.loss = loss
        parts = step.loss_parts or step.named_losses(step.losses_read or ())[0]
        parts = {name: value for name, value in parts.items() if name != "other_losses"}
        if loss is not step.computed_loss and parts:
            rest = loss - tf.cast(terms.total(parts.values()), loss.dtype)
            step.loss_parts = {**parts, "other_losses": rest}

    @property
    def losses(self):
        """The losses that `call` and regularisers added; in a step those of the registry too, weighted."""
        step = model_step(self)
        added = list(super().losses)
        if step is None:
            return added
        step.losses_read = added + step.registry_losses()
        return list(step.losses_read)

    def minimize(self, loss, variables, optimizer=None, tape=None):
        """One correct update: loss scale, gradients, clipping by the optimizer, finite check, update.

        Args:
            loss: scalar (a larger tensor is averaged), computed inside `tape`; or a function without arguments
                that computes it, then no tape is needed.
            variables: the list of variables to update.
            optimizer: a `keras.optimizers.Optimizer`, that of `compile` by default. Under `mixed_float16` it is
                given a loss scale if it has none.
            tape: the `tf.GradientTape`, after its block.

        Returns the global norm of the unscaled gradients, a float32 scalar.

        Raises `ValueError` when there is no optimizer, no tape for a tensor, or no variable gets a gradient.

        ```python
        class GAN(tfloop.Model):
            def train_step(self, data):
                with tf.GradientTape() as tape:
                    loss = ...
                norm = self.minimize(loss, self.critic.trainable_variables, self.critic_optimizer, tape=tape)
                return {"critic_loss": loss, "critic_norm": norm}
        ```
        """
        optimizer = self._tfloop_scaling(optimizer if optimizer is not None else self.optimizer)
        if optimizer is None:
            raise ValueError("minimize(): there is no optimizer. Give one to compile(optimizer=...), or to minimize.")
        variables = list(variables)
        if not variables:
            raise ValueError("minimize(loss, variables): there are no variables. Is the network built that has them?")
        if callable(loss):
            with tf.GradientTape() as tape:
                loss = loss()
        if tape is None:
            raise ValueError(
                "minimize(loss, variables): a tensor needs the tape in which it was computed: minimize(loss, "
                "variables, tape=tape). Or give a function that computes it."
            )
        if not optimizer.built and not weights.are_waited_for(self):
            with tf.init_scope():
                optimizer.build(variables)
        scale = _keras.loss_scale(optimizer)
        size = tf.cast(tf.size(loss), loss.dtype)
        seed = tf.ones_like(loss) * tf.cast(1.0 if scale is None else scale, loss.dtype) / size
        step = current_step() if isinstance(current_step(), ModelStep) else None
        if step is not None and step.part is not None:
            seed *= tf.cast(step.part.share, loss.dtype)  # here, as the loss may depend on other replicas' examples
        gradients = tape.gradient(loss, [_keras.tensor_of(v) for v in variables], output_gradients=seed)
        if step is not None:
            gradients = step.of_the_batch(gradients, weighted=True)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))  # not `apply`: it may be overridden
        return global_norm(gradients, scale)

    def _tfloop_scaling(self, optimizer):
        """The optimizer with a loss scale where the policy needs one; the same object every time.

        Whether that of `compile` gets one was decided there.
        """
        mixed = self.dtype_policy.name == "mixed_float16"
        if optimizer is None or optimizer is self.optimizer or not mixed or _keras.scales_loss(optimizer):
            return optimizer
        known = self._tfloop_loss_scales
        if id(optimizer) not in known:
            known[id(optimizer)] = keras.optimizers.LossScaleOptimizer(optimizer)
        return known[id(optimizer)]

    def get_metrics_result(self):
        """The results of the metric objects, by name. Values that only the record has are not among them."""
        if model_step(self) is None:
            return super().get_metrics_result()
        found = {}
        for metric in self.metrics:
            if not isinstance(metric, terms.TermMetric):
                result = metric.result()
                found.update(result if isinstance(result, dict) else {metric.name: result})
        return found

    def _tfloop_has_own_step(self, kind):
        """Whether `train_step`, or its like for another kind, is the user's."""
        name = f"{kind}_step"
        return inspect.getattr_static(type(self), name) is not inspect.getattr_static(Model, name)

    def _tfloop_run_step(self, kind, data, compiled=False):
        """Runs `train_step`, `test_step` or `predict_step` on a batch, as the loop does. `compiled`: by XLA.

        Returns the step's row and its layout (see `loop/record.py`); for `"predict"` the predictions.
        """
        if kind == "predict":
            with self._tfloop_trainable_as_compiled():
                return self._tfloop_run_part(
                    kind, replicas.Part(replicas.Replica(), data), self._tfloop_completed_updates()
                )
        updates = self._tfloop_completed_updates()
        with self._tfloop_trainable_as_compiled():
            row, layout, finite = replicas.on_replicas(
                self, lambda r: self._tfloop_on_a_replica(kind, data, updates, r)
            )
        if kind == "train":
            self._tfloop_updates.assign_add(1)
            for average in self._tfloop_averages:
                average.update(updates + 1, compiled=compiled)
        return (row if finite is None else marked(row, finite)), layout

    def _tfloop_completed_updates(self):
        return tf.constant(0, tf.int64) if self._tfloop_updates is None else self._tfloop_updates.read_value()

    def _tfloop_on_a_replica(self, kind, data, updates, replica):
        """Goes through one replica's part of a batch, which may be several that make an update together."""
        batches, accumulation = [data], None
        if kind == "train" and self._tfloop_micro_batch is not None:
            batches = micro_batches(data, self._tfloop_micro_batch)
        if len(batches) > 1:
            accumulation = Accumulation([int(keras.tree.flatten(batch)[0].shape[0]) for batch in batches])
        rows, applied = [], []
        for batch in batches:
            part = replica.part(batch)
            with part.metrics_of(self):
                row, layout = self._tfloop_run_part(kind, part, updates, accumulation, applied)
            rows.append((part.counted(row), layout))
            if accumulation is not None:
                accumulation.next_batch()
        row, layout = merged(rows)
        finite = is_finite(losses(row, layout), applied) if kind == "train" and self._tfloop_guarded else None
        return row, layout, finite

    def _tfloop_run_part(self, kind, part, updates, accumulation=None, applied=()):
        """Goes through one batch, or one replica's part of it."""
        step = ModelStep(self, kind, part.data, updates, accumulation, part if part.replicated else None)
        with running(step):
            with step.hearing():
                returned = step_function(self, f"{kind}_step")(part.data)
            if kind == "predict":
                return returned
            applied.extend(step.applied)
            if kind == "train" and self._tfloop_guarded:
                applied.extend(step.unseen_updates())
            lazily = getattr(type(self), f"{kind}_step") is getattr(Model, f"{kind}_step")
            return step.row(returned, lazily)

    # Compilation.

    def compile(
        self,
        optimizer="rmsprop",
        loss=None,
        loss_weights=None,
        metrics=None,
        weighted_metrics=None,
        run_eagerly=False,
        steps_per_execution="auto",
        jit_compile="auto",
        auto_scale_loss=True,
        accumulate=1,
    ):
        """As `keras.Model.compile`.

        Args:
            accumulate: int, how many batches make one update. Their gradients are averaged, weighted by the
                number of examples (a loss that divides by something else, by a mask or not at all, is so the mean
                of theirs, not that of one large batch); what is left at the end of an epoch makes an update of its
                own. A step of the loop, of a schedule and of a log is then an update; `steps_per_epoch` counts
                batches.
            steps_per_execution: `"auto"` lets the loop choose how many steps run in one call; an int is obeyed.
            jit_compile: `"auto"` lets the loop measure; `True` or `"step"` compiles the step with XLA, `"loop"`
                whole chunks of steps, `False` nothing.

        Raises `ValueError` for a learning rate that is not finite and for values that do not exist.
        """
        check_choice("jit_compile", jit_compile, ("auto", True, False, "step", "loop"))
        check_steps_per_execution(steps_per_execution)
        check_accumulate(accumulate)
        _keras.forget_compilation(self)
        super().compile(
            optimizer=optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=1,
            jit_compile=False,
            auto_scale_loss=auto_scale_loss,
        )
        check_learning_rate(self.optimizer)
        self.__dict__["_tfloop_choices"] = {
            "steps_per_execution": steps_per_execution,
            "jit_compile": jit_compile,
            "accumulate": accumulate,
        }
        self.__dict__["_tfloop_micro_batch"] = None
        if self._tfloop_updates is None:
            self.__dict__["_tfloop_updates"] = plain_variable(0, dtype=tf.int64, name="updates")
        self.__dict__["_tfloop_loop"] = None
        self.__dict__["_tfloop_evaluated"] = None, None
        self.__dict__["_tfloop_tracks_loss"] = False
        self.__dict__["_tfloop_as_compiled"] = {
            layer: (layer.trainable, [(v, v.trainable) for v in _keras.own_trainable_variables(layer)])
            for _, layer in names.walk(self)
            if isinstance(layer, keras.layers.Layer)
        }

    def get_compile_config(self):
        config = super().get_compile_config()
        return {**config, **self.__dict__.get("_tfloop_choices", {})} if config else config

    def compile_from_config(self, config):
        """Compiles with what `get_compile_config` returned."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    @contextlib.contextmanager
    def _tfloop_trainable_as_compiled(self):
        """What is trained is what was trainable at `compile`, whatever other models did to the flags since."""
        changed = [
            (layer, layer.trainable, flag, variables)
            for layer, (flag, variables) in self._tfloop_as_compiled.items()
            if layer.trainable != flag
        ]
        restore = []
        try:
            for layer, now, flag, variables in changed:
                restore.append((layer, now, [(v, v.trainable) for v, _ in variables]))
                _keras.set_trainable_flag(layer, flag, variables)
            yield
        finally:
            for layer, flag, variables in restore:
                _keras.set_trainable_flag(layer, flag, variables)

    # The loop.

    @property
    def metrics(self):
        """Metric objects: those of `compile`, then the model's own, then its layers', owners first."""
        return terms.all_metrics(self)

    @property
    def metrics_names(self):
        """The names of the values that `evaluate` returns: of the latest evaluation of the model as it is now.

        Before there is one, those that are known: `call` and `watch` may add some.
        """
        known, version = self.__dict__.get("_tfloop_evaluated", (None, None))
        return list(known) if known and version == terms.versions(self) else expected_names(self)

    def _tfloop_evaluated_to(self, logs):
        self.__dict__["_tfloop_evaluated"] = tuple(logs), terms.versions(self)

    @Default
    def engine(self):
        """The engine that the loop uses: `"eager"`, `"graph"`, `"jit"` or `"scan"`; `None` before a fit."""
        return self._tfloop_loop.engine if self._tfloop_loop is not None else None

    def reset_metrics(self):
        """Resets every metric object, also those that an overridden `metrics` does not list."""
        for metric in self._tfloop_every_metric():
            metric.reset_state()

    def _tfloop_every_metric(self):
        """The metric objects that `metrics` lists, and those that it does not where a user's own leaves some out."""
        found = terms.all_metrics(self)
        if type(self).metrics is Model.metrics:
            return found
        return list({id(m): m for m in [*self.metrics, *found]}.values())

    @property
    def _tfloop_resets_all_metrics(self):
        """Whether `reset_metrics` is the one above, which leaves none out."""
        return getattr(self.reset_metrics, "__func__", None) is Model.reset_metrics

    def extra_state(self):
        """State beside weights, optimizers and seeds: the number of completed updates, loss scales of `minimize`, the
        running average."""
        state = {} if self._tfloop_updates is None else {"updates": self._tfloop_updates}
        for index, optimizer in enumerate(self._tfloop_loss_scales.values()):
            if optimizer.built:
                state[f"loss_scales/{index}/step_counter"] = optimizer.step_counter
                state[f"loss_scales/{index}/dynamic_scale"] = optimizer.dynamic_scale
        return state if self._tfloop_running_average is None else {**state, **self._tfloop_running_average.state()}

    def _tfloop_get_loop(self, predicts=False):
        """The loop of the model as it is compiled. What only `predicts` needs no `compile`."""
        if not self.compiled and not predicts:
            raise ValueError(
                "You must call `compile()` before using the model: model.compile(optimizer=..., loss=...)."
            )
        if self._tfloop_loop is None:
            self.__dict__["_tfloop_loop"] = fitting.Loop(ModelSteps(self))
        return self._tfloop_loop

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        shuffle=True,
        class_weight=None,
        sample_weight=None,
        initial_epoch=0,
        steps_per_epoch=None,
        validation_steps=None,
        validation_batch_size=None,
        validation_freq=1,
    ):
        """Trains the model. Arguments and result as in `keras.Model.fit`.

        The order of shuffled arrays is a function of the seed (`tfloop.set_seed`) and the epoch. With `steps_per_epoch`
        an epoch begins in the data where the last ended, and arrays begin anew within it. A generator that is used up
        ends the training with a warning.

        Returns a `keras.callbacks.History`.
        """
        refuse_swapped(self)
        self.__dict__["_tfloop_averages"] = [c for c in callback_objects(callbacks) if isinstance(c, WeightAverage)]
        history = self._tfloop_get_loop().fit(
            x,
            y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle,
            class_weight=class_weight,
            sample_weight=sample_weight,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
        )
        if validation_data is not None or validation_split:
            self._tfloop_evaluated_to(n.removeprefix("val_") for n in history.history if n.startswith("val_"))
        return history

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        verbose="auto",
        sample_weight=None,
        steps=None,
        callbacks=None,
        return_dict=False,
        **kwargs,
    ):
        """The loss and metrics on data. Arguments and result as in `keras.Model.evaluate`."""
        if kwargs:
            raise TypeError(f"evaluate() got unexpected arguments: {names.listing(kwargs)}.")
        loop = self._tfloop_get_loop()
        options = {"batch_size": batch_size, "verbose": verbose, "sample_weight": sample_weight, "steps": steps}
        with loop.apart():
            logs = loop.evaluate(x, y, callbacks=callbacks, **options)
        self._tfloop_evaluated_to(logs)
        return logs if return_dict else as_list(logs)

    def predict(self, x, batch_size=None, verbose="auto", steps=None, callbacks=None):
        """The outputs for data, as NumPy arrays. Changes no metric. As `keras.Model.predict`."""
        return self._tfloop_get_loop(predicts=True).batchwise.predict(
            x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks
        )

    def train_on_batch(self, x, y=None, sample_weight=None, class_weight=None, return_dict=False):
        """One update on one batch. Returns the batch's loss and metrics, as Keras does."""
        refuse_swapped(self)
        loop = self._tfloop_get_loop()
        with loop.apart():
            logs = loop.batchwise.step("train", x, y, sample_weight, class_weight)
        return logs if return_dict else as_list(logs)

    def test_on_batch(self, x, y=None, sample_weight=None, return_dict=False):
        """The loss and metrics of one batch."""
        loop = self._tfloop_get_loop()
        with loop.apart():
            logs = loop.batchwise.step("test", x, y, sample_weight)
        self._tfloop_evaluated_to(logs)
        return logs if return_dict else as_list(logs)

    def predict_on_batch(self, x):
        """The outputs for one batch, as NumPy arrays."""
        return self._tfloop_get_loop(predicts=True).batchwise.predict_on_batch(x)


class FunctionalModel(Model, _keras.Functional):
    """What `tfloop.Model(inputs, outputs)` makes: losses and metrics may be symbolic tensors of its graph.

    Keras makes a class functional by rewriting its bases; on `tfloop.Model` that would change every model.
    """

    def __init__(self, inputs, outputs, name=None, **kwargs):
        _keras.Functional.__init__(self, inputs, outputs, name=name, **kwargs)
        self.__dict__["_tfloop_symbolic"] = []  # (kind, KerasTensor, {"name": ...})
        self.__dict__["_tfloop_inherited"] = None
        for tensor in keras.tree.flatten(outputs):
            self._tfloop_copies(*vars(tensor).pop("_cloned_by_tfloop", (None, ())))
        if type(self).__init__ is FunctionalModel.__init__:
            self._tfloop_inherit()

    def _tfloop_copies(self, source, values):
        """This model is a clone of `source`, and `values` are its symbolic terms in the clone's graph."""
        if source is not None:
            symbolic = [
                (kind, value, extra) for (kind, _, extra), value in zip(source._tfloop_symbolic, values, strict=True)
            ]
            self.__dict__["_tfloop_inherited"] = symbolic, source

    def _tfloop_inherit(self):
        """Takes the terms of the model this is a copy of, but for those that a user's constructor added anew."""
        (symbolic, source), self.__dict__["_tfloop_inherited"] = self._tfloop_inherited or ((), None), None
        for kind, value, extra in symbolic[len(self._tfloop_symbolic) :]:
            (self._add_symbolic_loss if kind == "loss" else self._add_symbolic_metric)(value, **extra)
        if source is None:
            return
        self._tfloop_take_functions(source)
        weights.restore_parametrizations(self, weights.parametrization_config(source))

    def compile(self, *args, **kwargs):
        self._tfloop_inherit()
        super().compile(*args, **kwargs)

    @property
    def layers(self):
        """The layers of the graph, those that only a loss or metric needs last."""
        found = super().layers
        more = self._with_terms.layers if self.__dict__.get("_tfloop_symbolic") else []
        return found + [layer for layer in more if not any(layer is other for other in found)]

    def _run_through_graph(self, inputs, operation_fn=lambda op: op, call_fn=None):
        """Rebuilds the larger graph, with the terms, when `keras.models.clone_model` asks for a copy of this one."""
        if not _keras.is_cloning(operation_fn):
            return super()._run_through_graph(inputs, operation_fn=operation_fn, call_fn=call_fn)
        if _keras.makes_its_own_graph(self):
            raise ValueError(
                f"clone_model: the constructor of {type(self).__name__} takes no inputs and outputs, and Keras would "
                "make a plain keras.Model without losses and metrics of it. Make another one by its constructor, or by "
                f"{type(self).__name__}.from_config(model.get_config()), and copy the weights."
            )
        graph = self._with_terms if self._tfloop_symbolic else self
        values = _keras.Functional._run_through_graph(graph, inputs, operation_fn=operation_fn, call_fn=call_fn)
        outputs, *values = values if self._tfloop_symbolic else [values]
        keras.tree.flatten(outputs)[0]._cloned_by_tfloop = (self, values)
        return outputs

    def _add_symbolic_loss(self, value, name, weight):
        self._tfloop_add_symbolic(("loss", value, {"name": name, "weight": weight}))

    def _add_symbolic_metric(self, value, name, aggregation):
        self._tfloop_check_new_metric(name)
        self._tfloop_add_symbolic(("metric", value, {"name": name, "aggregation": aggregation}))
        terms.term_metric(self, name, aggregation)

    def _tfloop_add_symbolic(self, entry):
        entries = [*self._tfloop_symbolic, entry]
        try:
            graph = keras.Model(self._inputs_struct, [self._outputs_struct, *(t for _, t, _ in entries)])
        except ValueError as error:
            raise ValueError(
                f"add_{entry[0]}(name={entry[2]['name']!r}): the symbolic tensor is not connected to the inputs of "
                f"the model ({names.listing(t.name for t in self.inputs)}). {error}"
            ) from None
        if self._tfloop_symbolic:
            _keras.untrack(self, self.__dict__["_with_terms"])
        self._with_terms = graph  # tracked, so that layers that only a term needs are the model's too
        self.__dict__["_tfloop_symbolic"] = entries
        self._tfloop_terms.version += 1

    def call(self, inputs, training=None, mask=None, **kwargs):
        self._tfloop_inherit()
        if not self._tfloop_symbolic:
            return super().call(inputs, training=training, mask=mask, **kwargs)
        outputs, *values = self._with_terms.call(inputs, training=training, mask=mask, **kwargs)
        for (kind, _, extra), value in zip(self._tfloop_symbolic, values, strict=True):
            if kind == "loss":
                self.add_loss(value, **extra)
            else:
                self.add_metric(value, **extra)
        return outputs

    def get_config(self):
        self._tfloop_inherit()
        config = super().get_config()
        if self._tfloop_symbolic and not _keras.makes_its_own_graph(self):
            config["with_terms"] = keras.saving.serialize_keras_object(self._with_terms)
            config["terms"] = [
                {"kind": kind, **{k: keras.saving.serialize_keras_object(terms.plain(v)) for k, v in extra.items()}}
                for kind, _, extra in self._tfloop_symbolic
            ]
        self._tfloop_warn_of_functions()
        parametrizations = weights.parametrization_config(self)
        return {**config, "parametrizations": parametrizations} if parametrizations else config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        parametrizations = config.pop("parametrizations", None)
        model = cls._tfloop_from_graph_config(config, custom_objects)
        weights.restore_parametrizations(model, parametrizations)
        return model

    @classmethod
    def _tfloop_from_graph_config(cls, config, custom_objects):
        with_terms, entries = config.pop("with_terms", None), config.pop("terms", ())
        if with_terms is None:
            return super().from_config(config, custom_objects=custom_objects)
        graph = keras.saving.deserialize_keras_object(with_terms, custom_objects=custom_objects)
        outputs, *values = graph.output
        model = cls(graph.input, outputs, name=config["name"], trainable=config.get("trainable", True))
        symbolic = []
        for entry, value in zip(entries, values, strict=True):
            extra = {k: keras.saving.deserialize_keras_object(v, custom_objects) for k, v in entry.items()}
            symbolic.append((extra.pop("kind"), value, extra))
        model.__dict__["_tfloop_inherited"] = symbolic, None
        model._tfloop_inherit()
        return model


keras.saving.register_keras_serializable("tfloop", "Model")(FunctionalModel)


def step_function(model, name):
    """The model's `train_step` or its like. What is a `tf.function` becomes a part of the step around it, which could
    not tell the results of metrics that come out of a graph of its own."""
    declared = inspect.getattr_static(type(model), name)
    if not isinstance(declared, tf.types.experimental.GenericFunction):
        return getattr(model, name)
    return functools.partial(tf.autograph.to_graph(declared.python_function), model)


def callback_objects(callbacks):
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks.callbacks
    return keras.tree.flatten(callbacks) if callbacks is not None else []


def is_functional(args, kwargs):
    """Whether a model's arguments are the inputs and outputs of a functional model."""
    return len(args) == 2 or (len(args) == 1 and "outputs" in kwargs) or ("inputs" in kwargs and "outputs" in kwargs)


def become_functional(cls):
    """Puts `FunctionalModel` in the place of `Model` among the bases of a user's class."""
    if cls is Model or not issubclass(cls, Model) or issubclass(cls, FunctionalModel):
        return
    for base in cls.__bases__:
        become_functional(base)
    cls.__bases__ = tuple(FunctionalModel if base is Model else base for base in cls.__bases__)


def check_choice(name, value, choices):
    if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
        raise ValueError(f"compile({name}={value!r}): expected one of {', '.join(repr(c) for c in choices)}.")


def check_steps_per_execution(value):
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"compile(steps_per_execution={value!r}): expected 'auto' or a whole number, 1 or more.")


def check_accumulate(value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"compile(accumulate={value!r}): expected a whole number of batches, 1 or more.")


def check_learning_rate(optimizer):
    if optimizer is None:
        return
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):  # has no rate of its own
        for inner in optimizer.optimizers:
            check_learning_rate(inner)
        return
    rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
    if not math.isfinite(rate):
        raise ValueError(f"compile(): the optimizer's learning rate is {rate}. Expected a finite number.")


def global_norm(gradients, scale):
    """The global norm of unscaled gradients; slices of one row are summed first, as the update does."""
    found = [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in gradients if g is not None]
    norm = tf.linalg.global_norm(found)
    return norm if scale is None else norm / tf.cast(scale, tf.float32)


def as_list(logs):
    values = list(logs.values())
    return values[0] if len(values) == 1 else values
