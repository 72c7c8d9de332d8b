"""A stream that is counted through gives the batches that it would have given to one who read all of them."""

import itertools
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfloop
from tfloop.loop import replay
from tfloop.loop.accumulation import accumulated
from tfloop.loop.feed import batches_of
from tfloop.loop.replay import FIXED, RESHUFFLES, UNKNOWN, count_through
from tfloop.loop.source import make_source

X = np.arange(24, dtype="float32")[:, None]


def numbers():
    return tf.data.Dataset.from_tensor_slices(X)


def shuffled():
    return numbers().shuffle(24)


def noisy(x):
    return x + tf.random.uniform([])


def drawing():
    rng = np.random.default_rng(3)
    return tf.data.Dataset.from_generator(
        lambda: (rng.normal(size=1).astype("float32") for _ in range(24)), output_signature=tf.TensorSpec([1])
    )


class Loader:
    """Shuffles anew in each pass, as torch's does with a generator."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __iter__(self):
        order = self.rng.permutation(24)
        return (X[order[i : i + 4]] for i in range(0, 24, 4))


class Permuting(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.order = np.arange(24)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return X[self.order[4 * i : 4 * i + 4]]

    def on_epoch_begin(self):
        self.order = self.rng.permutation(self.order)

    def on_epoch_end(self):
        self.order = self.order[::-1]


def endless():
    rng = np.random.default_rng(0)
    while True:
        yield rng.normal(size=(4, 1)).astype("float32")


STREAMS = {
    "fixed": lambda: (numbers().batch(4), None),
    "shuffled": lambda: (shuffled().batch(4), None),
    "shuffled once": lambda: (numbers().shuffle(24, reshuffle_each_iteration=False).batch(4), None),
    "shuffled twice": lambda: (shuffled().batch(4).shuffle(6), None),
    "shuffled, then repeated": lambda: (shuffled().repeat(2).batch(4), None),
    "shuffled, then cached": lambda: (shuffled().cache().batch(4), None),
    "joined": lambda: (numbers().take(12).shuffle(12).concatenate(shuffled().take(12)).batch(4), None),
    "sampled": lambda: (
        tf.data.Dataset.sample_from_datasets([shuffled().repeat(), shuffled().repeat()], seed=1).batch(4).take(5),
        None,
    ),
    "noisy": lambda: (shuffled().map(noisy).batch(4), None),
    "from a generator": lambda: (drawing().batch(4), None),
    "in parts": lambda: (shuffled().batch(4).repeat(), 4),
    "running out": lambda: (shuffled().batch(4), 4),
    "loader": lambda: (Loader(), None),
    "loader in parts": lambda: (Loader(), 4),
    "PyDataset": lambda: (Permuting(), None),
    "PyDataset in parts": lambda: (Permuting(), 4),
    "generator": lambda: (endless(), 5),
}


def batches(feeder):
    """The first numbers of all batches that a feeder has left."""
    return [np.asarray(keras.tree.flatten(batch)[0]).ravel().tolist() for batch in batches_of(feeder)]


def opened(stream, accumulate, sampled):
    tfloop.set_seed(1)
    x, steps = STREAMS[stream]()
    source = make_source(x, steps=steps, goes_on=True)
    if accumulate:
        source, _ = accumulated(source, 2)
    if sampled:
        source.sample(1, 1)
    return source


@pytest.mark.filterwarnings("ignore:Your input ran out")
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("accumulate", "sampled"), [(False, False), (True, False), (False, True)])
def test_counting_through(stream, blocks, accumulate, sampled):
    whole = opened(stream, accumulate, sampled)
    epochs = [batches(whole.feeder(epoch, blocks=blocks)) for epoch in range(4)]
    assert epochs[0] != epochs[3] or stream in ("fixed", "shuffled once", "shuffled, then cached")
    for epoch, start in itertools.product((0, 1, 3), (0, 1)):
        rest = opened(stream, accumulate, sampled)
        count_through(rest, range(epoch))
        assert batches(rest.feeder(epoch, start, blocks=blocks)) == epochs[epoch][start:]


def test_natures():
    files = tf.data.Dataset.from_tensor_slices(["a"])
    found = {
        FIXED: [
            numbers().batch(2).prefetch(1).cache().repeat(3),
            files.interleave(tf.data.TFRecordDataset).map(tf.strings.length),
            files.map(tf.io.read_file, num_parallel_calls=2),
            numbers().map(noisy),
        ],
        RESHUFFLES: [shuffled().map(lambda x: x + 1).filter(lambda x: x[0] > 3).batch(2), numbers().shuffle(3).take(2)],
        UNKNOWN: [shuffled().repeat(), shuffled().cache(), drawing(), numbers().enumerate()],
    }
    for nature, datasets in found.items():
        assert [replay.nature(d) for d in datasets] == [nature] * len(datasets)


class Remembering(tfloop.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)


def validation(kind):
    data = tf.data.Dataset.from_tensor_slices((X, X))
    if kind == "part of a shuffled one":
        return data.shuffle(24).batch(4).take(2), None
    if kind == "beginning of an endless one":
        return data.batch(4).repeat(), 2
    return ((b, b) for b in endless()), 2


@pytest.mark.parametrize("kind", ["part of a shuffled one", "beginning of an endless one", "generator"])
def test_the_validation_goes_on_where_it_was_after_a_resume(kind, tmp_path):
    histories = []
    for first, folder in ((None, "whole"), (3, "parts")):
        for epochs in (first, 5):
            if epochs is None:
                continue
            tfloop.set_seed(1)
            model = Remembering()
            model.compile(keras.optimizers.SGD(1e-4), "mse", jit_compile=False)
            data, steps = validation(kind)
            run = tfloop.Run(tmp_path / folder, seed=1, log=())
            run.fit(
                model, X, X, epochs=epochs, validation_data=data, validation_steps=steps, validation_freq=2, verbose=0
            )
        histories.append(run.history.history["val_loss"])
    assert histories[0] == histories[1]
    assert len(histories[0]) == 2


@pytest.mark.parametrize("stream", ["shuffled", "generator"])
def test_a_run_that_begins_in_a_later_epoch_goes_on_where_it_was(stream, tmp_path):
    histories = []
    for stops, folder in (([5], "whole"), ([4, 5], "parts")):
        for epochs in stops:
            tfloop.set_seed(1)
            model = Remembering()
            model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=False)
            data, steps = STREAMS[stream]()
            pairs = data.map(lambda x: (x, x)) if stream == "shuffled" else ((b, b) for b in data)
            run = tfloop.Run(tmp_path / folder, seed=1, log=())
            run.fit(model, pairs, initial_epoch=2, epochs=epochs, steps_per_epoch=steps, verbose=0)
        histories.append(run.history.history["loss"])
    assert histories[0] == histories[1] and len(histories[0]) == 3


def test_each_validation_of_so_many_steps_begins_anew():
    model = Remembering()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    data = tf.data.Dataset.from_tensor_slices((X, X)).batch(4)
    for validation_data in (data, data.repeat(), (X, X)):
        history = model.fit(
            X, X, epochs=3, validation_data=validation_data, validation_steps=2, validation_batch_size=4, verbose=0
        ).history
        found = np.mean((model.predict(X[:8], verbose=0) - X[:8]) ** 2)
        np.testing.assert_allclose(history["val_loss"], found, rtol=1e-5)


def test_more_steps_than_there_are_data_end_with_them():
    model = Remembering()
    model.compile("sgd", "mse")
    for x, y, size in ((X, X, 8), (tf.data.Dataset.from_tensor_slices((X, X)).batch(8), None, None)):
        expected = model.evaluate(X, X, verbose=0)
        with pytest.warns(UserWarning, match="ran out"):
            assert model.evaluate(x, y, batch_size=size, steps=7, verbose=0) == pytest.approx(expected, rel=1e-5)
    with pytest.warns(UserWarning, match="ran out"):
        assert model.predict(X, batch_size=8, steps=7, verbose=0).shape == (24, 1)


def test_a_generator_goes_on_in_a_second_fit_of_one_run(tmp_path, caplog):
    read, seen = [], []

    class Seeing(Remembering):
        def train_step(self, data):
            seen.append(int(data[0][0, 0]))
            return super().train_step(data)

    def numbered():
        for i in itertools.count():
            read.append(i)
            yield np.full((4, 1), i, "float32"), np.full((4, 1), i, "float32")

    model = Seeing()
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=True)
    run, data = tfloop.Run(tmp_path, seed=1, log=()), numbered()
    for epochs in (1, 2):
        run.fit(model, data, epochs=epochs, steps_per_epoch=3, verbose=0)
    assert seen[:4] == [0, 0, 1, 2]  # one step that builds the model is taken back
    assert len(seen) == 7 and seen[4] <= 3 + 18  # what was read ahead
    assert "make a new one for each fit" in caplog.text


@pytest.mark.parametrize("kind", ["generator", "shuffled"])
def test_what_gives_other_data_the_second_time_cannot_be_rolled_back(kind, tmp_path):
    model = Remembering()
    model.compile("sgd", "mse")
    data = ((b, b) for b in endless())
    if kind == "shuffled":
        data = tf.data.Dataset.from_tensor_slices((X, X)).shuffle(24).batch(4)
    with pytest.raises(RuntimeError, match="on_nan='skip'"):
        tfloop.Run(tmp_path, on_nan="rollback").fit(model, data, steps_per_epoch=3, verbose=0)


class Slow(keras.utils.PyDataset):
    turned = False

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return X[4 * i : 4 * i + 4][:: -1 if self.turned else 1]

    def on_epoch_end(self):
        time.sleep(1.3)
        self.turned = not self.turned


def test_an_epoch_begins_when_the_data_are_done_with_the_last_one():
    source = make_source(Slow(), goes_on=True)
    first, second = (batches(source.feeder(epoch)) for epoch in range(2))
    assert second == [batch[::-1] for batch in first]


def test_what_comes_is_looked_at_without_reading_on():
    read = []
    source = make_source((read.append(i) or X[:4] for i in range(9)), goes_on=True, steps=9)
    assert source.spec.shape[1:] == [1]
    time.sleep(0.3)
    assert read == [0] and len(batches(source.feeder(0))) == 9
