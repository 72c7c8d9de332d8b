"""Every form of data that Keras takes gives the same training, and bad data one clear error."""

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf
from keras import layers, ops
from keras.src.trainers.data_adapters.data_adapter_utils import class_weight_to_sample_weights

import tfloop
from tfloop.loop import arrays
from tfloop.loop import source as sources

X = np.random.default_rng(0).normal(size=(10, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(10, 2)).astype("float32")


def regression(**compiled):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = tfloop.Model(inputs, layers.Dense(2)(inputs))
    model.compile("sgd", "mse", **compiled)
    return model


def batches():
    for i in range(0, 10, 4):
        yield X[i : i + 4], Y[i : i + 4]


class Pairs(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


class Loader:
    """As a torch loader: iterable, with a length, giving lists."""

    def __len__(self):
        return 3

    def __iter__(self):
        return (list(batch) for batch in batches())


FORMS = {
    "arrays": lambda: (X, Y),
    "float64": lambda: (X.astype("float64"), Y.astype("float64")),
    "lists of numbers": lambda: (X.tolist(), Y.tolist()),
    "tensors": lambda: (tf.constant(X), tf.constant(Y)),
    "variables": lambda: (tf.Variable(X), keras.Variable(Y)),
    "dataset": lambda: (tf.data.Dataset.from_tensor_slices((X, Y)).batch(4),),
    "dataset of unknown length": lambda: (tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).filter(lambda *b: True),),
    "generator": lambda: (batches(),),
    "PyDataset": lambda: (Pairs(),),
    "loader": lambda: (Loader(),),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}])
def test_every_form_trains_alike(form, mode):
    model = regression(**mode)
    batch_size = 4 if form in list(FORMS)[:5] else None
    history = model.fit(*FORMS[form](), batch_size=batch_size, shuffle=False, verbose=0).history
    reference = regression(run_eagerly=True)
    losses = [reference.train_on_batch(x, y) for x, y in batches()]
    np.testing.assert_allclose(history["loss"], [np.average(losses, weights=[4, 4, 2])], rtol=1e-5)
    np.testing.assert_allclose(model.get_weights()[0], reference.get_weights()[0], rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_evaluates_and_predicts_alike(form):
    model = regression()
    data = FORMS[form]
    expected = np.mean((X @ model.get_weights()[0] - Y) ** 2)
    np.testing.assert_allclose(model.evaluate(*data(), verbose=0), expected, rtol=1e-5)
    np.testing.assert_allclose(model.predict(data()[0], verbose=0), X @ model.get_weights()[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["dict", "list", "tuple"])
def test_structures_of_inputs_and_targets(kind):
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    outputs = [layers.Dense(2, name="p")(a), layers.Dense(1, name="q")(b)]
    model = tfloop.Model([a, b], outputs)
    model.compile("sgd", ["mse", "mae"])
    x = {"dict": {"a": X, "b": 2 * X}, "list": [X, 2 * X], "tuple": (X, 2 * X)}[kind]
    y = [Y, Y[:, :1]]
    history = model.fit(x, y, epochs=2, batch_size=4, verbose=0).history
    assert list(history) == ["loss", "p_loss", "q_loss"]
    np.testing.assert_allclose(history["loss"], np.add(history["p_loss"], history["q_loss"]), rtol=1e-6)
    p, q = model.predict(x, verbose=0)
    assert p.shape == (10, 2)
    assert q.shape == (10, 1)


LABELS = {
    "negative": (np.array([-1, -1, 1, 1, 0], "float32"), {-1: 3.0, 1: 0.5}),
    "negative only": (np.array([-1, -2, 1, 0, 7]), {-2: 3.0}),
    "nearly whole": (np.array([0.1, 0.9, 1.5, 2.5, 1.2], "float32"), {0: 1.0, 1: 5.0, 2: 7.0}),
    "in a column": (np.array([[3], [1], [5], [200], [0]], "uint8"), {1: 2.0, 200: 4.0}),
    "one-hot": (np.eye(5, 4, dtype="float32"), {0: 2.0, 3: 4.0, 9: 5.0}),
    "bool": (np.array([True, False, True, True, False]), {0: 2.0, 1: 4.0}),
    "no weight": (np.array([0, 1, 2, 0, 1]), {}),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", [np.asarray, tf.constant, tf.Variable])
def test_class_weights_are_those_that_keras_gives(labels, kind):
    y, class_weight = LABELS[labels]
    transform = sources.weighing(class_weight)
    data = X[:5], sources.as_array(kind(y))
    expected = class_weight_to_sample_weights(y, class_weight)
    np.testing.assert_array_equal(transform(data)[2], expected)
    if kind is not np.asarray:
        in_graph = tf.function(lambda x, y: transform((x, y))[2], autograph=False)
        np.testing.assert_array_equal(in_graph(*data), expected)


def test_arrays_of_python_strings_are_data():
    texts = np.array(["a", "b", "c", "a", "b"], dtype=object)
    histories = []
    for base in (keras.Model, tfloop.Model):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((), dtype="string")
        numbers = layers.StringLookup(vocabulary=["a", "b", "c"])(inputs)
        model = base(inputs, layers.Dense(1)(layers.Embedding(5, 2)(numbers)))
        model.compile("sgd", "mse")
        histories.append(model.fit(texts, np.ones((5, 1)), batch_size=2, shuffle=False, verbose=0).history["loss"])
    assert histories[1] == pytest.approx(histories[0], rel=1e-5)


def test_sample_and_class_weights_weigh():
    labels = np.arange(10) % 2
    model = tfloop.Model(i := keras.Input((3,)), layers.Dense(1)(i))
    model.compile(keras.optimizers.SGD(0.0), "mse", weighted_metrics=["mae"])
    target = labels[:, None].astype("float32")
    error = (X @ model.get_weights()[0] - target)[:, 0] ** 2
    weights = np.linspace(0, 1, 10).astype("float32")
    by_sample = model.fit(X, target, sample_weight=weights, batch_size=10, verbose=0).history
    np.testing.assert_allclose(by_sample["loss"][0], np.mean(error * weights), rtol=1e-5)
    by_class = model.fit(X, target, class_weight={0: 1.0, 1: 3.0}, batch_size=10, verbose=0).history
    np.testing.assert_allclose(by_class["loss"][0], np.mean(error * np.where(labels, 3, 1)), rtol=1e-5)


def test_validation_split_is_the_last_part_and_is_not_trained_on():
    model = regression()
    history = model.fit(X, Y, validation_split=0.2, epochs=1, batch_size=8, shuffle=False, verbose=0).history
    reference = regression()
    reference.fit(X[:8], Y[:8], batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(history["val_loss"][0], reference.evaluate(X[8:], Y[8:], verbose=0), rtol=1e-6)


@pytest.mark.parametrize("frequency", [2, [1, 4]])
def test_validation_freq(frequency):
    history = regression().fit(X, Y, epochs=4, validation_data=(X, Y), validation_freq=frequency, verbose=0).history
    assert len(history["val_loss"]) == 2
    assert len(history["loss"]) == 4


def test_initial_epoch_and_epochs():
    seen = []
    log = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(epoch))
    regression().fit(X, Y, initial_epoch=2, epochs=5, callbacks=[log], verbose=0)
    assert seen == [2, 3, 4]


def test_steps_per_epoch_goes_on_where_the_last_epoch_ended():
    class Remember(tfloop.Model):
        def call(self, x):
            self.add_metric(x[0, 0], name="first")
            self.add_loss(0.0 * ops_mean(x))
            return x

    model = Remember()
    model.compile("sgd")
    data = np.arange(12, dtype="float32")[:, None]
    with pytest.warns(UserWarning, match="trainable"):
        history = model.fit(data, batch_size=2, steps_per_epoch=2, epochs=4, shuffle=False, verbose=0).history
    assert history["first"] == [1.0, 5.0, 9.0, 1.0]  # means of the first examples of batches 0-1, 2-3, 4-5, 0-1


def ops_mean(x):
    return keras.ops.mean(x)


def test_an_endless_generator_needs_steps_per_epoch_and_goes_on():
    def endless():
        i = 0
        while True:
            yield np.full((2, 3), i, "float32"), np.zeros((2, 2), "float32")
            i += 1

    model = regression()
    model.add_metric(lambda t: keras.ops.mean(t["x"]), name="x_mean")
    history = model.fit(endless(), steps_per_epoch=3, epochs=3, verbose=0).history
    assert history["x_mean"] == [1.0, 4.0, 7.0]


def test_a_generator_that_ends_early_warns_and_ends_the_epoch():
    with pytest.warns(UserWarning, match="ran out of data"):
        history = regression().fit(batches(), steps_per_epoch=5, verbose=0).history
    assert len(history["loss"]) == 1


class Order(tfloop.Model):
    """Logs which example each step saw."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)
        self.seen = []

    def call(self, x):
        return self.dense(x)


def orders(shuffle, epochs=2, seed=0, **fit):
    tfloop.set_seed(seed)
    model = Order()
    model.add_metric(lambda t: t["x"][0, 0], name="x", aggregation="last")
    model.compile("sgd", "mse")
    data = np.arange(12, dtype="float32")[:, None]
    log = []
    spy = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: log.append(logs["x"]))
    model.fit(data, data, batch_size=1, shuffle=shuffle, epochs=epochs, callbacks=[spy], verbose=0, **fit)
    return np.reshape(log, (-1, 12))


def test_the_order_is_a_function_of_seed_and_epoch():
    first, again, other = orders(True), orders(True), orders(True, seed=1)
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any()
    assert (first != other).any()
    np.testing.assert_array_equal(np.sort(first, axis=1), np.tile(np.arange(12), (2, 1)))
    np.testing.assert_array_equal(orders(True, initial_epoch=1), first[1:])


def test_without_shuffle_the_order_is_the_datas():
    np.testing.assert_array_equal(orders(False), np.tile(np.arange(12), (2, 1)))


BAD = {
    "unequal lengths": (lambda m: m.fit(X, Y[:7], verbose=0), "x: 10, y: 7"),
    "empty arrays": (lambda m: m.fit(X[:0], Y[:0], verbose=0), "0 examples"),
    "empty dataset": (lambda m: m.fit(tf.data.Dataset.from_tensor_slices((X[:0], Y[:0])).batch(2), verbose=0), "empty"),
    "empty generator": (lambda m: m.fit(iter(()), verbose=0), "no batch"),
    "no data": (lambda m: m.fit(verbose=0), "`x` is None"),
    "y beside a dataset": (lambda m: m.fit(tf.data.Dataset.from_tensors((X, Y)), Y, verbose=0), "`y` cannot be given"),
    "batch_size 0": (lambda m: m.fit(X, Y, batch_size=0, verbose=0), "batch_size=0"),
    "epochs -1": (lambda m: m.fit(X, Y, epochs=-1, verbose=0), "epochs=-1"),
    "split 1.5": (lambda m: m.fit(X, Y, validation_split=1.5, verbose=0), "validation_split=1.5"),
    "endless dataset": (
        lambda m: m.fit(tf.data.Dataset.from_tensors((X, Y)).repeat(), verbose=0),
        "infinite",
    ),
    "words": (lambda m: m.fit(np.array([object()] * 10), Y, verbose=0), "no kind of data"),
    "targets missing": (lambda m: m.fit(X, verbose=0), "needs targets"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_one_clear_error_and_nothing_is_trained(case):
    model = regression()
    before = model.get_weights()[0]
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(model)
    np.testing.assert_array_equal(model.get_weights()[0], before)
    assert int(model.optimizer.iterations) == 0


def test_training_needs_a_loss():
    model = tfloop.Model(i := keras.Input((3,)), layers.Dense(2)(i))
    model.compile("sgd")
    with pytest.raises(ValueError, match="add one"):
        model.fit(X, Y, verbose=0)


def test_training_needs_compile():
    model = tfloop.Model(i := keras.Input((3,)), layers.Dense(2)(i))
    with pytest.raises(ValueError, match="compile"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizer": keras.optimizers.SGD(float("nan"))},
        {
            "optimizer": keras.optimizers.MultiOptimizer(
                keras.optimizers.OptimizerMap(keras.optimizers.SGD(float("nan")))
            )
        },
        {"jit_compile": "fast"},
        {"steps_per_execution": 0},
        {"steps_per_execution": True},
    ],
    ids=["NaN learning rate", "NaN in one of several", "jit", "no step", "a bool"],
)
def test_compile_refuses_what_cannot_be(arguments):
    model = tfloop.Model(i := keras.Input((3,)), layers.Dense(2)(i))
    with pytest.raises(ValueError):
        model.compile(**{"optimizer": "sgd", "loss": "mse", **arguments})


def test_predict_needs_no_compile_and_changes_no_metric():
    model = regression()
    model.add_metric(lambda t: keras.ops.mean(t["y_pred"]), name="mean")
    model.fit(X, Y, verbose=0)
    before = [float(m.result()) for m in model.metrics if m.name in ("loss", "mean")]
    model.predict(X, verbose=0)
    assert [float(m.result()) for m in model.metrics if m.name in ("loss", "mean")] == before


@pytest.mark.parametrize("eager", [False, True])
def test_predict_leaves_a_model_uncompiled_whose_compile_takes_arguments_of_its_own(eager):
    class Pair(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def compile(self, one_optimizer, other_optimizer):
            super().compile(one_optimizer)

        def call(self, x):
            z = self.dense(x)
            self.add_loss(keras.ops.mean(z**2), name="size", weight=lambda step: keras.ops.cast(step, "float32"))
            self.add_metric(keras.ops.mean(x), name="mean")
            return z

    model = Pair()
    model.run_eagerly = eager
    found = [model.predict(X, batch_size=4, verbose=0), model.predict_on_batch(X)]
    expected = X @ model.dense.kernel.numpy()
    for values in found:
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert not model.compiled and model.engine is None
    with pytest.raises(ValueError, match="compile"):
        model.evaluate(X, verbose=0)
    model.compile("sgd", "sgd")
    assert np.isfinite(model.fit(X, verbose=0).history["loss"]).all()
    np.testing.assert_allclose(model.predict(X, verbose=0), model(X), rtol=1e-5, atol=1e-6)


def test_single_batches_as_in_keras():
    mine = regression()
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    keras_model = keras.Model(inputs, layers.Dense(2)(inputs))
    keras_model.compile("sgd", "mse", metrics=["mae"])
    mine.compile("sgd", "mse", metrics=["mae"])
    for x, y in batches():
        np.testing.assert_allclose(mine.train_on_batch(x, y), keras_model.train_on_batch(x, y), rtol=1e-5)
    np.testing.assert_allclose(mine.test_on_batch(X, Y), keras_model.test_on_batch(X, Y), rtol=1e-5)
    assert list(mine.test_on_batch(X, Y, return_dict=True)) == ["loss", "mae"]
    np.testing.assert_allclose(mine.predict_on_batch(X), keras_model.predict_on_batch(X), rtol=1e-5)


class Series:
    """What a series of pandas offers."""

    def __init__(self, values):
        self.iloc = self._values = values
        self.shape, self.ndim, self.dtype = values.shape, values.ndim, values.dtype

    def to_numpy(self):
        return self._values


def test_a_series_of_pandas_is_a_column_as_in_keras():
    class Shapes(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.seen = layers.Dense(1), []

        def call(self, x):
            return self.dense(x)

        def train_step(self, data):
            self.seen.append([part.shape.as_list() for part in data])
            return super().train_step(data)

    model = Shapes()
    model.compile("sgd", "mse")
    model.fit(X, Series(Y[:, 0]), sample_weight=Series(np.ones(10)), batch_size=5, verbose=0)
    assert model.seen and all(shapes == [[5, 3], [5, 1], [5, 1]] for shapes in model.seen)


@pytest.mark.parametrize("shapes", [[(2, 3), (2, 5), (1, 5)], [(2, 3, 2), (2, 5, 2)], [(2, 3, 2), (3, 3, 4)]])
def test_predictions_whose_batches_differ_in_other_dimensions_are_ragged(shapes):
    def predicted(kind):
        class Doubling(kind):
            def call(self, x):
                return {"twice": 2 * x, "half": x / 2}

        batches = ((np.arange(np.prod(shape), dtype="float32").reshape(shape),) for shape in shapes)
        return Doubling().predict(batches, verbose=0)

    mine, keras_ = predicted(tfloop.Model), predicted(keras.Model)
    for name, expected in keras_.items():
        assert isinstance(mine[name], tf.RaggedTensor)
        assert mine[name].shape.as_list() == expected.shape.as_list() and mine[name].dtype == expected.dtype
        assert mine[name].to_list() == expected.to_list()


def test_predictions_that_are_sparse_are_put_together():
    class Sparse(tfloop.Model):
        def call(self, x):
            return tf.sparse.from_dense(tf.nn.relu(x))

    found = Sparse().predict(X, batch_size=4, verbose=0)
    np.testing.assert_array_equal(tf.sparse.to_dense(found), np.maximum(X, 0))


RAGGED = tf.RaggedTensor.from_row_lengths(X.ravel(), [1, 4, 3, 0, 5, 2, 2, 6, 3, 4])
SPARSE = tf.sparse.from_dense(np.where(X > 0.3, X, 0))


class Summing(keras.Model):
    """Takes rows of any length."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2, kernel_initializer="ones")

    def call(self, x):
        x = x.to_tensor() if isinstance(x, tf.RaggedTensor) else x
        x = tf.sparse.reduce_sum(x, 1, keepdims=True) if isinstance(x, tf.SparseTensor) else ops.sum(x, 1, True)
        return self.dense(ops.reshape(x, (-1, 1)))


class OurSumming(Summing, tfloop.Model):
    pass


def scipy_matrix():
    return scipy.sparse.csr_matrix(np.where(X > 0.3, X, 0).astype("float64"))


@pytest.mark.parametrize("x", [lambda: RAGGED, lambda: SPARSE, scipy_matrix], ids=["ragged", "sparse", "SciPy"])
@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}])
def test_ragged_and_sparse_arrays_as_in_keras(x, mode):
    theirs, ours = Summing(), OurSumming()
    found = []
    for model in (theirs, ours):
        model.compile(keras.optimizers.SGD(0.01), "mse", metrics=["mae"], **mode)
        history = model.fit(x(), Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history
        found.append([*history.values(), model.evaluate(x(), Y, verbose=0), model.get_weights()[0].ravel().tolist()])
        found[-1].append(model.predict(x(), batch_size=4, verbose=0).ravel().tolist())
    for mine, keras_value in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(mine, keras_value, rtol=1e-5, atol=1e-6)


def test_ragged_and_sparse_arrays_are_shuffled_and_split():
    for x in (RAGGED, SPARSE):
        dense = x.to_tensor() if x is RAGGED else tf.sparse.to_dense(x)
        order = np.random.default_rng(0).permutation(10)
        picked = arrays.picked(x, order)
        found = picked.to_tensor() if x is RAGGED else tf.sparse.to_dense(picked)
        np.testing.assert_array_equal(found, dense.numpy()[order])
        model = OurSumming()
        model.compile("sgd", "mse")
        history = model.fit(x, Y, validation_split=0.3, batch_size=2, epochs=2, verbose=0).history
        rest = arrays.picked(x, np.arange(7, 10))
        np.testing.assert_allclose(history["val_loss"][-1], model.evaluate(rest, Y[7:], verbose=0), rtol=1e-6)


@pytest.mark.parametrize("x", [RAGGED, SPARSE], ids=["ragged", "sparse"])
def test_single_ragged_and_sparse_batches(x):
    theirs, ours = Summing(), OurSumming()
    for model in (theirs, ours):
        model.compile(keras.optimizers.SGD(0.01), "mse")
    for rows in ([0, 1, 2], [5, 3, 7], [8, 9]):
        batch = arrays.picked(x, np.array(rows)), Y[rows]
        np.testing.assert_allclose(ours.train_on_batch(*batch), theirs.train_on_batch(*batch), rtol=1e-5)
        np.testing.assert_allclose(ours.test_on_batch(*batch), theirs.test_on_batch(*batch), rtol=1e-5)
        np.testing.assert_allclose(ours.predict_on_batch(batch[0]), theirs.predict_on_batch(batch[0]), rtol=1e-5)


class Untraceable(tfloop.Model):
    """Can only run eagerly."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2, kernel_initializer="ones")
        self.noise = layers.GaussianNoise(0.1)
        self.seeds = keras.random.SeedGenerator(1)

    def call(self, x, training=False):
        drawn = keras.random.uniform((), seed=self.seeds)
        return self.noise(self.dense(tf.constant(x.numpy())), training=training) + 1e-6 * drawn


@pytest.mark.parametrize("data", ["arrays", "dataset", "generator"])
def test_what_runs_eagerly_need_not_be_traceable(data):
    model = Untraceable()
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"], run_eagerly=True)
    batch_size = 4 if data == "arrays" else None
    history = model.fit(*FORMS[data](), batch_size=batch_size, shuffle=False, verbose=0).history
    assert history["loss"][0] == pytest.approx(np.mean((X.sum(1, keepdims=True) - Y) ** 2), rel=0.2)
    expected = np.mean(np.abs(X.sum(1, keepdims=True) - Y))
    assert model.evaluate(X, Y, verbose=0)[1] == pytest.approx(expected, rel=1e-5)
    for method in ("predict", "predict_on_batch"):
        fresh = Untraceable()
        fresh.compile(run_eagerly=True)
        predicted = getattr(fresh, method)(X)
        np.testing.assert_allclose(predicted, np.repeat(X.sum(1, keepdims=True), 2, 1), rtol=1e-4, atol=1e-5)


def test_building_by_calling_leaves_no_trace():
    """The seeds have moved by one for every step."""
    model = Untraceable()
    model.compile("adam", "mse", metrics=["mae"], run_eagerly=True)
    before = model.seeds.state.numpy().astype(int)
    model.fit(X, Y, batch_size=4, verbose=0)
    assert (model.seeds.state.numpy() - before).tolist() == [0, 3]
    assert int(model.optimizer.iterations.numpy()) == 3


class CountsInPython(keras.metrics.Mean):
    """Its reset is more than its variables."""

    seen = 0

    def update_state(self, *args, **kwargs):
        return super().update_state(1.0)

    def reset_state(self):
        super().reset_state()
        self.seen += 1


def test_a_reset_of_one_s_own_is_called_for_every_single_batch():
    metric = CountsInPython(name="counts")
    model = regression(metrics=[metric, "mae"])
    before = metric.seen
    for _ in range(3):
        logs = model.train_on_batch(X, Y, return_dict=True)
        assert logs["counts"] == 1.0
    assert metric.seen - before == 3


def test_a_generator_that_is_used_up_ends_the_training():
    ended = []
    log = keras.callbacks.LambdaCallback(on_train_end=lambda logs: ended.append(logs))
    with pytest.warns(UserWarning, match="ran out"):
        history = regression().fit(batches(), epochs=3, verbose=0, callbacks=[log])
    assert len(history.history["loss"]) == 1 and ended[0]["loss"] == history.history["loss"][0]
    with pytest.warns(UserWarning, match="ran out"):
        history = regression().fit(X, Y, validation_data=batches(), epochs=3, verbose=0)
    assert len(history.history["loss"]) == 3 and len(history.history["val_loss"]) == 1
    with pytest.raises(ValueError, match="empty"):
        regression().fit(iter([]), verbose=0)


class Numbered(keras.utils.PyDataset):
    def __init__(self, length):
        super().__init__()
        self.length = length

    @property
    def num_batches(self):
        return self.length

    def __getitem__(self, i):
        return np.full((2, 3), i, "float32"), np.zeros((2, 2), "float32")


def test_the_order_of_a_pydataset_is_a_function_of_the_epoch():
    def orders(initial_epoch):
        model, seen = regression(), []
        model.add_metric(lambda t: t["x"][0, 0], name="batch", aggregation="last")
        spy = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["batch"]))
        tfloop.set_seed(0)
        model.fit(Numbered(6), initial_epoch=initial_epoch, epochs=3, callbacks=[spy], verbose=0)
        return np.reshape(seen, (-1, 6))

    every = orders(0)
    assert (every[0] != every[1]).any() and (every[0] != every[2]).any()
    np.testing.assert_array_equal(orders(1), every[1:])
    np.testing.assert_array_equal(orders(2), every[2:])


def numbered(length):
    return tf.data.Dataset.range(length or 100).map(
        lambda i: (tf.fill((2, 3), tf.cast(i, "float32")), tf.zeros((2, 2)))
    )


@pytest.mark.filterwarnings("ignore:Your input ran out")
@pytest.mark.parametrize("make", [Numbered, numbered, lambda n: numbered(n).filter(lambda *batch: True)])
@pytest.mark.parametrize("length", [4, 5, None])
def test_data_go_on_in_the_next_epoch(length, make):
    """With `steps_per_epoch`, as in Keras where the length is known."""
    losses = []
    for kind in (keras.Model, tfloop.Model):
        data = numbered if kind is keras.Model and make is not Numbered else make
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        model = kind(inputs, layers.Dense(2)(inputs))
        model.compile(keras.optimizers.SGD(0.0), "mse")
        losses.append(model.fit(data(length), epochs=4, steps_per_epoch=2, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
