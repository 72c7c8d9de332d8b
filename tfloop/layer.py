"""`tfloop.Layer`: a Keras layer with `add_metric` restored and named losses.

What `call` hands over belongs to the layer it was called on. Inside a tfloop step the step gathers it; in a
plain call, and under Keras' own `fit`, losses go where Keras keeps them and metrics to metric objects.
"""

import keras
import tensorflow as tf

from tfloop import _keras, terms
from tfloop.statistics import check_aggregation
from tfloop.step import current_step


class Adding:
    """`add_loss` and `add_metric` as layers and models have them inside `call`."""

    def add_loss(self, value, name=None, weight=1.0, inputs=None):
        """Adds a loss to what is minimised. Called inside `call`, with a tensor or number.

        Args:
            value: a tensor of any shape, averaged over its elements, or a number, or a list of them; or a
                function without arguments.
            name: str, under which the weighted loss is shown. Unnamed losses are shown together.
            weight: float; a scalar variable, which every step reads; or a function of the number of completed
                updates, a float32 scalar.
            inputs: taken for code written for Keras 2, and not used.

        Raises `ValueError` when called outside `call` with a tensor, which could not be computed anew.

        ```python
        class Sparse(tfloop.Layer):
            def call(self, x):
                self.add_loss(ops.mean(ops.abs(x)), name="sparsity", weight=1e-3)
                return x

        layer = Sparse()
        layer(np.ones((2, 3), "float32"))
        np.testing.assert_allclose(layer.losses[0], 1e-3)
        ```
        """
        del inputs
        terms.check_name(name, "add_loss")
        weight = terms.check_weight(weight)
        for item in keras.tree.flatten(value):
            self._add_one_loss(item, name, weight)

    def _add_one_loss(self, value, name, weight):
        if isinstance(value, keras.KerasTensor):
            self._add_symbolic_loss(value, name, weight)
            return
        inside = inside_call()
        if callable(value):
            if not inside:
                self._register_loss(value, name, weight)
                return
            if terms.takes_tensors(value):
                raise ValueError(
                    f"add_loss({terms.label(value)}) inside `call`: a function of the step's tensors is added from "
                    "outside, on the model, once. Inside `call` hand over a tensor."
                )
            value = value()
        if not inside:
            raise ValueError(
                "Expected a symbolic tensor or a callable for the loss value. Outside `call` please wrap the loss "
                f"computation in a function: add_loss(lambda: ...), or add_loss(lambda t: ...). Got {value!r}."
            )
        check_leaves(f"add_loss(name={name!r})")
        loss = self._weighted_loss(value, f"add_loss(name={name!r})", weight, name)
        keras.layers.Layer.add_loss(self, loss)

    def _weighted_loss(self, value, what, weight, name):
        """The loss as a weighted scalar, of which the step is told."""
        loss = terms.weighted(terms.mean_scalar(value, what), weight, completed_updates(weight, what))
        step = current_step()
        if hasattr(step, "note_loss"):
            step.note_loss(loss, name, self)
        return loss

    def add_metric(self, value=None, name=None, aggregation="mean"):
        """Adds a metric: a value that is logged and changes nothing. Called inside `call`.

        Args:
            value: a tensor or number of any shape; or the result of a `keras.Metric` called inside `call`.
            name: str. Needed unless the value is a metric object's result, whose own name is used.
            aggregation: `"mean"` (also `None`), `"sum"`, `"min"`, `"max"` or `"last"`: over the elements of the
                value, over several calls in one step, and over the steps of an epoch.

        The values are float32 in the log and never weights; several calls with one name make one metric.

        Raises `ValueError` without a name, and when called outside `call` with a tensor.

        ```python
        class Norm(tfloop.Layer):
            def call(self, x):
                self.add_metric(ops.norm(x, axis=1), name="norm")
                return x

        layer = Norm()
        layer(np.ones((2, 4), "float32"))
        np.testing.assert_allclose(layer.metrics[0].result(), 2.0)
        ```
        """
        if value is None and not inside_call():
            return lambda function: self.add_metric(function, name=name, aggregation=aggregation)
        if value is None or isinstance(value, keras.Metric):
            terms.as_number(value, f"add_metric(name={name!r})")  # says what is wrong
        aggregation = aggregation or "mean"
        marked = _keras.metric_of(value)
        if marked:
            self._list_metric(marked[0])
            return value
        if isinstance(value, keras.KerasTensor):
            name = terms.metric_name(None, name)
            check_aggregation(aggregation, f"add_metric(name={name!r})")
            self._add_symbolic_metric(value, name, aggregation)
            return value
        if callable(value) and not isinstance(value, keras.Metric | keras.Variable):
            name = terms.metric_name(value, name)
            check_aggregation(aggregation, f"add_metric(name={name!r})")
            self._register_metric(value, name, aggregation)
            return value
        name = terms.metric_name(None, name)
        tensor = terms.as_number(value, f"add_metric(name={name!r})")
        if not inside_call():
            raise ValueError(
                f"add_metric(name={name!r}): expected a symbolic tensor or a callable for the metric value, received "
                f"{value!r}. Outside `call` a tensor has one value for ever: add a function of the step's tensors."
            )
        self._gather_metric(tensor, name, aggregation)
        return value

    def _gather_metric(self, value, name, aggregation):
        check_leaves(f"add_metric(name={name!r})")
        same = [m for m in _keras.own_metrics(self) if m.name == name]
        if len(same) > 1:
            raise ValueError(terms.two_of_one_name(name) + f" We found {len(same)} metrics with the name {name!r}.")
        if any(term.name == name for term in terms.registry(self).metrics):
            raise ValueError(terms.two_of_one_name(name) + " It was added from outside.")
        step = current_step()
        if same and (step is None or step.kind in ("train", "test")):
            same[0].update_state(value)
            return
        if step is not None and step.kind == "build":
            return  # learning shapes: the first real step says which metrics there are, and in which order
        metric = terms.term_metric(self, name, aggregation)
        if metric.aggregation != aggregation:
            raise ValueError(
                f"add_metric(name={name!r}, aggregation={aggregation!r}): the metric of this name has aggregation "
                f"{metric.aggregation!r}."
            )
        if hasattr(step, "note_metric"):
            step.note_metric(self, name, aggregation, value)
        elif step is None:
            metric.update_state(value)

    def _list_metric(self, metric):
        """Keeps a metric object that is no attribute of ours among our metrics."""
        known = (*_keras.own_metrics(self), *terms.term_metrics(self).values())
        if not any(metric is m for m in known):
            terms.term_metrics(self)[metric.name] = metric
        if hasattr(current_step(), "note_handed_over"):
            current_step().note_handed_over(metric)

    def __call__(self, *args, **kwargs):
        for metric in _keras.own_metrics(self):
            _keras.mark_results(metric)
        with _keras.noticing_maps():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]  # that of the layer this is mixed into

    def _refuse(self, what):
        raise ValueError(
            f"{type(self).__name__}.{what}: outside `call` only a tfloop.Model takes functions of the step's tensors, "
            "and only a functional one takes symbolic tensors."
        )

    def _add_symbolic_loss(self, value, name, weight):
        self._refuse(f"add_loss(name={name!r})")

    def _add_symbolic_metric(self, value, name, aggregation):
        self._refuse(f"add_metric(name={name!r})")

    def _register_metric(self, value, name, aggregation):
        self._refuse(f"add_metric(name={name!r})")

    def _register_loss(self, value, name, weight):
        self._refuse(f"add_loss(name={name!r})")


def completed_updates(weight, what):
    """The number of completed updates, for a weight that is a function of it.

    Raises `ValueError` in training where nobody counts them.
    """
    step, model = current_step(), _keras.called_layer()
    if step is not None or not callable(weight):
        return getattr(step, "updates", 0)
    if hasattr(model, "_tfloop_terms"):
        return 0 if model._tfloop_updates is None else model._tfloop_updates.read_value()
    traced = model is None and tf.inside_function()  # a layer's loss function, read by Keras' own training step
    if traced or (isinstance(model, keras.Model) and _keras.call_training() and not _keras.in_symbolic_scope()):
        raise ValueError(
            f"{what}: its weight is a function of the number of completed updates, which a plain keras.Model does not "
            "count. Make the model a tfloop.Model, or give a weight that is a variable, and assign to it."
        )
    return 0


def check_leaves(what):
    """Raises `ValueError` for a value of one example, which cannot be made that of all of them."""
    if _keras.maps_entered():
        raise ValueError(
            f"{what} inside a vectorized_map: its function sees one example, and the value cannot leave it. Return the "
            "value from the function, and add it outside."
        )


def inside_call():
    """Whether `call` may be running, and be it only so that Keras learns shapes (then there is no `__call__`)."""
    return _keras.in_call() or current_step() is not None or _keras.in_symbolic_scope()


class Layer(Adding, keras.layers.Layer):
    """`keras.layers.Layer` with `add_metric(value, name, aggregation)` and `add_loss(value, name, weight)`.

    It works in a `tfloop.Model`, in plain calls, and inside a plain `keras.Model` trained by Keras' own `fit`
    (where `Mean` metrics weigh every batch alike, as Keras does).

    ```python
    class Dense(tfloop.Layer):
        def __init__(self, units):
            super().__init__()
            self.dense = layers.Dense(units)

        def call(self, x):
            h = self.dense(x)
            self.add_metric(ops.mean(h**2), name="power")
            return h

    model = keras.Sequential([Dense(3)])
    model.compile("sgd", "mse")
    history = model.fit(np.ones((4, 2)), np.ones((4, 3)), verbose=0).history
    assert "power" in history
    ```
    """

    def _register_loss(self, value, name, weight):
        if terms.takes_tensors(value):
            self._refuse(f"add_loss({terms.label(value)})")
        self.__dict__.setdefault("_loss_functions", []).append((value, name, weight))

    def _get_own_losses(self):
        """Keras gathers a model's losses by this method; functions added outside `call` are evaluated here."""
        found = super()._get_own_losses()
        for function, name, weight in self.__dict__.get("_loss_functions", ()):
            found.append(self._weighted_loss(function(), f"add_loss({terms.label(function)})", weight, name))
        return found

    @property
    def metrics(self):
        """The metric objects of this layer and those below it."""
        found = [*_keras.own_metrics(self), *terms.term_metrics(self).values()]
        for layer in _keras.tracked_layers(self):
            found.extend(m for m in layer.metrics if not any(m is other for other in found))
        return found
