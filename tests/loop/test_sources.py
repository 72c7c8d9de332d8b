"""Sources: the same batches, wherever they are gathered and however they are handed out."""

import errno
import threading
import tracemalloc

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from loop_models import ENGINES, Chunks, data, dataset, fresh

from tfloop.loop import arrays, devices, feed, streams
from tfloop.loop.arrays import ArraySource
from tfloop.loop.source import make_source


def batches_of(source, epoch=0, limits=(1,), capacity=4, start=0):
    """The first leaf of each batch of an epoch, taken in chunks of the given lengths, in turns."""
    feeder = source.feeder(epoch, start, capacity)
    found, turn = [], 0
    while (taken := feeder.take(limits[turn % len(limits)])) is not None:
        assert taken.count <= limits[turn % len(limits)]
        found += [feed.batch_of(taken.kind, taken.args, i)[0].numpy().tolist() for i in range(taken.count)]
        turn += 1
    return found


def numbers(examples):
    return np.arange(examples, dtype="float32")


@given(
    examples=st.integers(1, 30),
    batch_size=st.integers(1, 9),
    shuffle=st.sampled_from([False, True, "batch"]),
    limits=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    epoch=st.integers(0, 2),
)
def test_gathering_on_the_host_gives_the_same_batches(examples, batch_size, shuffle, limits, epoch):
    resident = ArraySource(numbers(examples), batch_size, shuffle, seed=5)
    gathered = ArraySource(numbers(examples), batch_size, shuffle, seed=5)
    gathered.resident = False
    expected = batches_of(resident, epoch)
    assert batches_of(gathered, epoch, limits) == batches_of(resident, epoch, limits) == expected
    assert sorted(np.concatenate(expected).tolist()) == numbers(examples).tolist()


@given(start=st.integers(0, 12), limits=st.lists(st.integers(1, 4), min_size=1, max_size=3), resident=st.booleans())
def test_arrays_are_addressable(start, limits, resident):
    source = ArraySource(numbers(23), 3, shuffle=True, seed=1, steps=12)
    source.resident = resident
    assert batches_of(source, 1, limits, start=start) == batches_of(source, 1)[start:]


def test_order_is_a_function_of_seed_and_epoch():
    make = lambda seed: ArraySource(numbers(40), 4, shuffle=True, seed=seed)
    assert batches_of(make(1), 3) == batches_of(make(1), 3)
    assert batches_of(make(1), 3) != batches_of(make(1), 4)
    assert batches_of(make(1), 3) != batches_of(make(2), 3)


def test_what_fits_stays_and_what_does_not_is_gathered(monkeypatch):
    x, y = data(40)
    assert ArraySource((x, y)).resident
    monkeypatch.setattr(arrays, "resident_bytes", lambda: 500)
    assert not ArraySource((x, y)).resident


@pytest.mark.parametrize("engine", ENGINES)
def test_arrays_above_the_bound_train_as_others(engine, monkeypatch):
    x, y = data(26)
    inside = fresh(**ENGINES[engine])
    expected = inside.fit(x, y, batch_size=4, epochs=3, verbose=0).history
    monkeypatch.setattr(arrays, "resident_bytes", lambda: 500)
    above = fresh(**ENGINES[engine])
    found = above.fit(x, y, batch_size=4, epochs=3, verbose=0).history
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)
    assert threading.active_count() < 50


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
@pytest.mark.parametrize("engine", ["graph", "scan"])
def test_a_memory_map_is_not_read_into_memory(engine, dtype, tmp_path):
    examples, width = 4000, 512
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", dtype, (examples, width))
    mapped[:64] = np.random.default_rng(0).integers(0, 3, (64, width))
    mapped.flush()
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    y = np.zeros(examples, "int32")
    model = fresh(**ENGINES[engine])
    model.fit(x[:64], y[:64], batch_size=16, shuffle=False, verbose=0)
    tracemalloc.start()
    model.fit(x, y, batch_size=16, steps_per_epoch=4, shuffle=False, verbose=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 3
    ordinary = fresh(**ENGINES[engine])
    for _ in range(2):
        ordinary.fit(np.array(x[:64]), y[:64], batch_size=16, shuffle=False, verbose=0)
    for ours, expected in zip(model.get_weights(), ordinary.get_weights(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)


def test_a_sample_takes_no_batch_away():
    x, y = data(12)
    for source in (
        make_source(x, y, None, 4),
        make_source(dataset(x, y, 4)),
        make_source(iter([(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]), steps=3),
    ):
        sample = source.sample(3, 4, blocks=True)
        assert sample.kind in ("rows", "block") and sample.count in (1, 2, 3)
        for blocks in (False, True):
            if blocks and not source.addressable:
                continue
            feeder, count = source.feeder(0, 0, 4, blocks), 0
            while (taken := feeder.take(1)) is not None:
                if taken.kind == "iterator":
                    optional = taken.args[0].get_next_as_optional()
                    feeder.took(int(optional.has_value()), 1)
                    count += int(optional.has_value())
                else:
                    count += taken.count
            assert count == 3


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("steps", [None, 3])
def test_a_dataset_in_blocks_gives_what_it_gives_one_by_one(steps, sampled):
    x, y = numbers(22), numbers(22)
    source = make_source(dataset(x, y, 4).repeat(2), steps=steps, goes_on=True)
    if sampled:
        source.sample(2, 4, blocks=True)
    epochs = 2 if steps is None else 4
    found = []
    for epoch in range(epochs):
        feeder = source.feeder(epoch, 0, 4, blocks=True)
        while (taken := feeder.take(3)) is not None:
            found += [feed.batch_of(taken.kind, taken.args, i)[0].numpy().tolist() for i in range(taken.count)]
    once = [b[0].numpy().tolist() for b in dataset(x, y, 4).repeat(2)]
    assert found == (once * 2 if steps is None else once)


def test_an_array_becomes_a_tensor_without_a_copy():
    array = feed.empty((3, 5), "float32")
    array[...] = 1
    tensor = feed.as_tensor(array)
    array[0, 0] = 7  # as nobody does: it shows that the memory is shared
    assert tensor.numpy()[0, 0] == 7
    for kind in ("float64", "int64", "uint8", "bool", "float16"):
        np.testing.assert_array_equal(feed.as_tensor(np.ones((4, 3), kind)).numpy(), np.ones((4, 3), kind))


def test_reading_ahead_is_bounded():
    read = []

    def batches():
        for i in range(1000):
            read.append(i)
            yield i

    stream = streams.ReadAhead(batches(), 4)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    stream.close()
    assert len(read) <= 9


def test_text_and_ragged_batches_train_as_a_graph():
    ragged = tf.data.Dataset.from_tensor_slices((tf.ragged.constant([[1.0], [2.0, 3.0], [4.0]]), [0, 1, 2])).batch(2)
    source = make_source(ragged)
    assert source.sample(2, 4, blocks=True).kind == "batch"
    words = tf.data.Dataset.from_tensor_slices((["a", "b", "c"], [0, 1, 2])).batch(2)
    sample = make_source(words).sample(2, 4, blocks=True)
    assert sample.args[0].numpy()[0].tolist() == [b"a", b"b"]


@pytest.mark.parametrize("engine", ["graph", "scan"])
def test_a_generator_whose_batches_vary(engine):
    x, y = data(20)
    sizes = [4, 4, 2, 4, 3, 3]
    ends = np.cumsum(sizes)

    def batches():
        for end, size in zip(ends, sizes, strict=True):
            yield x[end - size : end], y[end - size : end]

    chunks = Chunks()
    model = fresh(**ENGINES[engine])
    model.fit(batches(), steps_per_epoch=6, verbose=0, callbacks=[chunks])
    assert np.concatenate([r.rows[:, 0] for r in chunks.records]).tolist() == sizes


def test_a_thread_ends_with_its_reader():
    stream = streams.ReadAhead(iter(int, 1), 4)  # endless
    assert next(stream) == 0
    threads = threading.active_count()
    del stream
    assert threading.active_count() == threads - 1


class Flaky(keras.utils.PyDataset):
    """Whose batch 2 cannot be read `fails` times."""

    def __init__(self, fails):
        super().__init__()
        self.fails, self.asked = fails, 0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            self.asked += 1
            if self.asked <= self.fails:
                raise OSError(errno.ESTALE, "Stale file handle")
        return np.full((2, 1), index, "float32")


@pytest.mark.parametrize("fails", [0, 3])
def test_what_could_not_be_read_is_read_again(fails, monkeypatch):
    monkeypatch.setattr(feed, "PAUSES", (0, 0, 0))
    found = np.concatenate([np.array(b) for b in batches_of(make_source(Flaky(fails)))])
    assert found[::2, 0].tolist() == [0, 1, 2, 3]


def test_what_stays_unreadable_is_an_error_after_four_times(monkeypatch):
    monkeypatch.setattr(feed, "PAUSES", (0, 0, 0))
    flaky = Flaky(100)
    with pytest.raises(OSError, match="Stale file handle"):
        batches_of(make_source(flaky))
    assert flaky.asked == 4


def test_arrays_on_disk_are_read_again(monkeypatch):
    read, asked = arrays.take_rows, []

    def failing(*arguments):
        asked.append(1)
        if len(asked) in (2, 3):
            raise OSError(errno.EIO, "Input/output error")
        read(*arguments)

    monkeypatch.setattr(feed, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(arrays, "take_rows", failing)
    source = ArraySource(numbers(10), 3)
    source.resident = False
    assert np.concatenate(batches_of(source)).tolist() == numbers(10).tolist()
    assert len(asked) == 6


def test_a_gpu_is_given_no_more_than_any_gpu_has(monkeypatch):
    monkeypatch.setattr(devices, "host_bytes", lambda: 2**40)
    for gpu, expected in ((False, 2**40), (True, 2**31)):
        monkeypatch.setattr(devices, "on_gpu", lambda gpu=gpu: gpu)
        assert devices.resident_bytes() == expected
