"""The running average of a model's weights, kept while it trains.

It is a second copy of the trainable weights (in float32 at least) and the number of snapshots in
it. It moves inside the compiled step, right after the update, so that it costs a copy
when a snapshot is due and nothing when none is.

BatchNorm statistics belong to the weights they were measured with. An average of weights keeps the
model's, which are those of the last weights: see `tfloop.reestimate_batch_norm`.
"""

import contextlib
import weakref

import keras
import numpy as np
import tensorflow as tf

from tfloop import names, reproducibility

KINDS = ("swa", "ema")


class WeightAverage(keras.callbacks.Callback):
    """A running average of the trainable weights, given to `fit` as a callback.

    Counted in updates: snapshots are taken after updates `start`, `start + every`,
    `start + 2 * every`, ...; `start=0` is the weights before the first update. With n snapshots w

        swa:  a = (w_1 + ... + w_n) / n
        ema:  a_1 = w_1,  a_n = decay * a_(n-1) + (1 - decay) * w_n

    `kind`: `"swa"` (Izmailov et al. 2018, arXiv:1803.05407) or `"ema"` (Polyak and Juditsky 1992).
    `decay`: of the EMA, in [0, 1).
    `validate`: whether the validation at the end of an epoch is done with the averaged weights.

    The model's own weights are not touched: `with tfloop.averaged(model):` puts the average in.
    Raises `ValueError` for a kind, start, interval or decay that there is not.

    ```python
    model = tfloop.Model(x := keras.Input((3,)), layers.Dense(1)(x))
    model.compile(optimizer="sgd", loss="mse")
    x, y = np.ones((8, 3), "float32"), np.ones((8, 1), "float32")
    model.fit(x, y, epochs=2, verbose=0, callbacks=[tfloop.WeightAverage("ema", decay=0.9)])
    with tfloop.averaged(model):
        model.evaluate(x, y, verbose=0)
    ```
    """

    def __init__(self, kind="swa", start=1, every=1, decay=0.999, validate=False):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: an average is one of {names.listing(KINDS)}.")
        if not is_count(start) or start < 0:
            raise ValueError(f"start={start!r}: expected a number of updates, 0 or more.")
        if not is_count(every) or every < 1:
            raise ValueError(f"every={every!r}: expected a number of updates, 1 or more.")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay!r}: expected 0 <= decay < 1.")
        self.kind, self.start, self.every, self.decay = kind, int(start), int(every), float(decay)
        self.validate = bool(validate)
        self.swapped = False
        self._model_of = lambda: None  # the model whose average it is
        self.count = None
        self._weights: list[keras.Variable] = []
        self._averages: list[keras.Variable] = []
        self._names: list[str] = []

    # -- what the loop calls ------------------------------------------------------------------

    def build(self, model):
        """Makes the state variables, once for a model, and becomes the model's running average, and no other's.

        Under a distribution strategy it is called in the strategy's scope.
        """
        if getattr(model, "_tfloop_running_average", None) is not self:
            refuse_swapped(model)
            refuse_swapped(self._model_of())
        weights = list(model.trainable_weights)
        if not model.built and not weights:  # one whose step calls its parts alone is never built itself
            raise ValueError(f"{model.name!r} has no weights yet: build it before averaging them.")
        if self.count is None or [id(w) for w in weights] != [id(w) for w in self._weights]:
            paths = {id(w): path for path, w in reproducibility.weights(model).items()}
            self._names = [paths[id(w)] for w in weights]
            self._weights = weights
            self._averages = [state_like(w) for w in weights]
            self.count = keras.Variable(0, dtype="int64", trainable=False, name="average_count")
        former = self._model_of()
        if former not in (None, model) and former._tfloop_running_average is self:
            former._tfloop_running_average = None  # it would be given the averages of this one
        self._model_of = weakref.ref(model)
        model._tfloop_running_average = self

    def begin(self):
        """Takes the snapshot of `start=0`. The loop calls it before the first update of a training
        that was not resumed."""
        if self.start == 0 and int(self.count.numpy()) == 0:
            self._take()

    def update(self, updates, applied=True, compiled=False):
        """Takes a snapshot if one is due after `updates` completed updates. Called in the step,
        right after an update, in graphs and under XLA.

        `updates`: int64 scalar. `applied`: bool scalar, false where the step made no update (a
        skipped one, or one batch of several that make an update together): then nothing moves.
        `compiled`: whether XLA compiles the step. Its conditionals copy every weight they may
        write, so that a selection costs less there; elsewhere a conditional does.
        """
        updates = tf.cast(updates, tf.int64)
        due = (updates >= self.start) & ((updates - self.start) % self.every == 0)
        due &= tf.cast(applied, tf.bool)
        if compiled:
            self._take(due)
        else:
            tf.cond(due, self._take, lambda: None)

    def state(self):
        """`name -> variable`: what a checkpoint saves and a fingerprint covers."""
        named = {f"average/{n}": v for n, v in zip(self._names, self._averages, strict=True)}
        if self.count is not None:
            named[names.unique("average/count", named)] = self.count
        return named

    def get_state(self):
        """Nothing: what a checkpoint keeps of a callback is here part of the model's state."""
        return {}

    def set_state(self, state):
        pass

    def for_validation(self, model):
        """The context in which validation runs: the averaged weights if asked for and there."""
        if self.validate and int(self.count.numpy()) > 0:
            return averaged(model)
        return contextlib.nullcontext(model)

    # -- what the average does ----------------------------------------------------------------

    def _take(self, due=True):
        count = tf.convert_to_tensor(self.count.value)
        mean_share = 1.0 / (tf.cast(count, tf.float32) + 1.0)
        share = mean_share if self.kind == "swa" else 1.0 - self.decay
        for weight, average in zip(self._weights, self._averages, strict=True):
            old = tf.convert_to_tensor(average.value)
            new = tf.cast(tf.convert_to_tensor(weight.value), old.dtype)
            moved = tf.where(count == 0, new, old + tf.cast(share, old.dtype) * (new - old))
            average.assign(tf.where(due, moved, old))
        self.count.assign_add(tf.cast(due, tf.int64))

    def swap_in(self, model):
        """Puts the average into the weights. Returns `(variable, value)` of all the model's state."""
        if self.swapped:
            raise RuntimeError(
                "The averaged weights are in the model already: `with tfloop.averaged(model)` does not nest."
            )
        saved = [(v, np.array(v.numpy())) for v in model.variables]
        self.swapped = True
        for weight, average in zip(self._weights, self._averages, strict=True):
            weight.assign(average.value)
        return saved

    def swap_out(self, saved):
        for variable, value in saved:
            variable.assign(value)
        self.swapped = False

    # -- what Keras calls ---------------------------------------------------------------------

    def on_train_begin(self, logs=None):
        if self.count is None:
            raise TypeError(
                f"WeightAverage is kept by tfloop's loop, and {self.model.name!r} is trained by "
                "Keras' own `fit`. Make it a tfloop.Model: `tfloop.Model(model.inputs, "
                "model.outputs)` for a functional or Sequential model."
            )
        refuse_swapped(self.model)


def refuse_swapped(model):
    """Raises `RuntimeError` if the model holds its averaged weights: what is trained then would be lost."""
    average = getattr(model, "_tfloop_running_average", None)
    if average is not None and average.swapped:
        raise RuntimeError(
            f"{model.name!r} holds its averaged weights: leave the `with tfloop.averaged(model)` block before "
            "training it."
        )


def is_count(value):
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def state_like(weight):
    """A copy of the weight's value in float32, or in float64 for a float64 weight."""
    dtype = "float64" if weight.dtype == "float64" else "float32"
    value = tf.convert_to_tensor(weight.value)  # given a tf.Variable, Keras would wrap that very one
    return keras.Variable(value, dtype=dtype, trainable=False, name=f"average_{weight.name}")


def running_average(model):
    """The model's `WeightAverage`; `ValueError` if it has none, or none with a snapshot."""
    average = getattr(model, "_tfloop_running_average", None)
    if average is None:
        raise ValueError(
            f"{model.name!r} has no running average: train it with `callbacks=[tfloop.WeightAverage(...)]`."
        )
    if int(average.count.numpy()) == 0:
        raise ValueError(
            f"The running average of {model.name!r} holds no snapshot yet: its first is taken "
            f"after update {average.start}."
        )
    return average


@contextlib.contextmanager
def averaged(model):
    """Within the block the model's weights are its running average; after it, what they were.

    Every byte is restored, under an exception too, and so is what was changed inside the block.
    Training inside it is refused. The state that is no trainable weight stays the model's: use
    `tfloop.reestimate_batch_norm` inside the block for the BatchNorm statistics of the average, and
    `tfloop.warm_start` for the `u` of its spectral norms.

    Raises `ValueError` if the model has no average or no snapshot yet, `RuntimeError` if nested.
    """
    average = running_average(model)
    saved = average.swap_in(model)
    try:
        yield model
    finally:
        average.swap_out(saved)
