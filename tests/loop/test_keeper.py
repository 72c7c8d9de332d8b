"""Steps that are taken back: what is left is a training that never saw their batches, to the bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from loop_models import ENGINES, Chunks, data

import tfloop
from tfloop import reproducibility
from tfloop.loop.observer import Observer

BATCH = 4
X, Y = data(40)  # ten batches


class Guard(Observer):
    """Takes back what is not finite, in chunks of four steps. `sizes`: the numbers of examples that it saw."""

    def __init__(self, halts=False):
        super().__init__()
        self.halts, self.sizes = halts, []

    def on_built(self, loop, source, callbacks):
        loop.guard()
        state = {**reproducibility.state_variables(self.model), **reproducibility.metric_variables(self.model)}
        loop.keep([v.value if isinstance(v, keras.Variable) else v for v in state.values()], self.halts)
        self.loop = loop

    def limit(self, steps):
        return 4

    def on_chunk(self, record, feed):
        self.sizes += record.rows[:, 0].tolist()
        record.rows = record.rows[record.rows[:, 0] > 0]
        if self.halts and min(self.sizes) < 0:
            self.model.stop_training = True
        return record


class Stateful(tfloop.Model):
    def __init__(self):
        super().__init__()
        self.hidden = tfloop.SpectralNormalization(layers.Dense(8))
        self.norm, self.dropout, self.logits = layers.BatchNormalization(), layers.Dropout(0.3), layers.Dense(3)

    def call(self, x, training=False):
        return self.logits(self.dropout(self.norm(self.hidden(x), training=training), training=training))


def fitted(x, y, how, kind, guard=None):
    tfloop.set_seed(3)
    model = Stateful()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(0.01), loss, metrics=["accuracy"], **how)
    given = {"arrays": (x, y), "dataset": (tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH),)}
    given["generator"] = (((x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)),)
    arguments = {"batch_size": BATCH, "shuffle": False} if kind == "arrays" else {}
    history = model.fit(*given[kind], verbose=0, callbacks=[guard or Chunks(4)], **arguments).history
    state = {**reproducibility.state_variables(model), **reproducibility.metric_variables(model)}
    return reproducibility.snapshot(state), history


def without(batches):
    kept = [i for i in range(len(X)) if i // BATCH not in batches]
    return X[kept], Y[kept]


def poisoned(batches):
    x = X.copy()
    for batch in batches:
        x[batch * BATCH + 1] = np.nan
    return x


@pytest.mark.parametrize("kind", ["arrays", "dataset", "generator"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [(0, 2, 3), (5, 7, 9)])
def test_as_if_the_batches_had_not_been_there(engine, kind, bad):
    guard = Guard()
    state, history = fitted(poisoned(bad), Y, ENGINES[engine], kind, guard)
    expected, expected_history = fitted(*without(bad), ENGINES[engine], kind)
    assert reproducibility.first_difference(state, expected) is None
    assert history == expected_history
    assert [i for i, size in enumerate(guard.sizes) if size < 0] == list(bad)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_halts_before_the_first(engine):
    guard = Guard(halts=True)
    state, _ = fitted(poisoned((6,)), Y, ENGINES[engine], "arrays", guard)
    expected, _ = fitted(X[: 6 * BATCH], Y[: 6 * BATCH], ENGINES[engine], "arrays")
    assert reproducibility.first_difference(state, expected) is None
    assert guard.sizes == [4.0] * 6 + [-4.0]


def test_a_fit_after_that_is_not_guarded():
    guard = Guard()
    tfloop.set_seed(3)
    model = Stateful()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    model.fit(X, Y, batch_size=BATCH, verbose=0, callbacks=[guard])
    model.fit(poisoned((0,)), Y, batch_size=BATCH, verbose=0)
    assert np.isnan(model.get_weights()[0]).all()


class Hidden(tfloop.Model):
    """Its gradient is not finite where its loss is, and the update is made in a graph of its own."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = layers.Dense(2, use_bias=False), how

    def call(self, x):
        return self.layer(x)

    def update(self, x):
        with tf.GradientTape() as tape:
            loss = tf.sqrt(tf.reduce_sum(self.layer(x) ** 2))
        variables = self.layer.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    inner = tf.function(update)

    def train_step(self, x):
        if self.how == "function":
            return {"loss": self.inner(x)}
        return {"loss": tf.cond(tf.reduce_sum(x) > -1e9, lambda: self.update(x), lambda: 0.0)}


@pytest.mark.parametrize("how", ["function", "cond"])
def test_a_gradient_within_another_graph_is_seen(how):
    found = []
    for x in (np.concatenate([X[:8], 0 * X[:4], X[8:16]]), X[:16]):
        tfloop.set_seed(3)
        model = Hidden(how)
        model(X[:1])
        model.compile("sgd", jit_compile=False)
        model.fit(x, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[Guard()])
        found.append(model.get_weights())
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_states_of_a_recurrent_layer_are_taken_back():
    found = []
    sequences = np.random.default_rng(0).normal(size=(20, 5, 3)).astype("float32")
    bad = sequences.copy()
    bad[9] = np.nan
    for x in (bad, sequences[[i for i in range(20) if i // BATCH != 2]]):
        tfloop.set_seed(3)
        inputs = keras.Input((5, 3), batch_size=BATCH)
        model = tfloop.Model(inputs, layers.Dense(1)(layers.LSTM(4, stateful=True)(inputs)))
        model.add_loss(lambda t: keras.ops.mean(t["y_pred"] ** 2))
        model.compile("adam", jit_compile=False)
        model.fit(x, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[Guard()])
        found.append(reproducibility.snapshot(reproducibility.state_variables(model)))
    assert any("states" in name for name in found[0])
    assert reproducibility.first_difference(*found) is None
