"""Logs: strict, complete, without a step twice, and not in the way."""

import csv
import errno
import json
import math
import os
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfloop.runs.writers import (
    CSV,
    JSONL,
    Composite,
    Curves,
    TensorBoard,
    Threaded,
    Writer,
    append_file,
    jsonl,
)
from tfloop.runs.writers.append_file import AppendFile, cut_after
from tfloop.runs.writers.curves import POINTS, SHARE, Curve


def strict(text):
    def refuse(name):
        raise ValueError(name)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def block(first, count, names=("loss", "acc"), dtype="f"):
    steps = np.arange(first, first + count)
    values = np.stack([steps * 0.5 + j for j in range(len(names))], axis=1).astype(dtype)
    return steps, list(names), values


def train(writer, first, count, epoch=0):
    steps, names, values = block(first, count)
    writer.rows("train", steps, epoch, names, values)


def rows(path):
    return [(row["split"], row["step"], row["epoch"]) for row in jsonl.read(path)]


class Recorded(Writer):
    """Keeps the calls it gets."""

    def __init__(self):
        self.calls, self.threads = [], set()

    def note(self, *call):
        self.calls.append(call)
        self.threads.add(threading.current_thread())

    def rows(self, split, steps, epoch, names, values, present=None):
        self.note("rows", split, steps.tolist())

    def histogram(self, name, step, edges, counts):
        self.note("histogram", name)

    def image(self, name, step, image):
        self.note("image", name)

    def resume(self, step, epoch):
        self.note("resume", step, epoch)

    def flush(self):
        self.note("flush")

    def close(self):
        self.note("close")


# JSONL


def test_a_row_is_as_the_contract_says(tmp_path):
    writer = JSONL(tmp_path / "metrics.jsonl")
    writer.rows("train", np.array([1]), 0, ["loss"], np.array([[0.25]], "f"))
    writer.scalars("epoch", 1, 0, {"loss": 0.25, "val_loss": 1})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"split": "train", "step": 1, "epoch": 0, "loss": 0.25}\n'
        '{"split": "epoch", "step": 1, "epoch": 0, "loss": 0.25, "val_loss": 1}\n'
    )


def test_what_is_not_finite_is_null_and_named():
    values = np.array([[np.nan, 1.0, -np.inf], [1.0, 2.0, 3.0]], "f")
    first, second = strict(jsonl.lines("train", np.array([4, 5]), 2, ["a", "b", "c"], values))
    assert first == {
        "split": "train",
        "step": 4,
        "epoch": 2,
        "a": None,
        "b": 1.0,
        "c": None,
        "nonfinite": ["a", "c"],
    }
    assert second == {"split": "train", "step": 5, "epoch": 2, "a": 1.0, "b": 2.0, "c": 3.0}


def test_what_was_not_computed_in_a_step_is_left_out():
    values, present = np.array([[np.nan, 1.0]], "f"), np.array([[False, True]])
    (row,) = strict(jsonl.lines("train", np.array([1]), 0, ["a", "b"], values, present))
    assert row == {"split": "train", "step": 1, "epoch": 0, "b": 1.0}


def test_a_metric_called_like_a_field_does_not_overwrite_it():
    (row,) = strict(jsonl.lines("train", np.array([1]), 0, ["step"], np.array([[7.0]])))
    assert row == {"split": "train", "step": 1, "epoch": 0, "metrics/step": 7}


@settings(max_examples=50)
@given(
    names=st.lists(st.text(), unique=True, min_size=1, max_size=3).filter(
        lambda names: not {"split", "step", "epoch", "nonfinite"} & set(names)
    ),
    dtype=st.sampled_from(["float32", "float64", "float16", "int64"]),
    data=st.data(),
)
def test_any_name_and_number_is_strict_json_that_keeps_every_bit(names, dtype, data):
    numbers = st.integers(-(2**53), 2**53) if dtype == "int64" else st.floats(width=int(dtype[5:]))
    values = np.array([[data.draw(numbers) for _ in names]], dtype)
    (row,) = strict(jsonl.lines("train", np.array([1]), 0, names, values).rstrip("\n").replace("\u2028", "?"))
    for name, value in zip(names, values[0].tolist(), strict=True):
        if math.isfinite(value):
            assert np.array(row[name], dtype) == np.array(value, dtype)
        else:
            assert row[name] is None and name in row["nonfinite"]


def test_after_a_resume_no_step_occurs_twice_and_none_is_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JSONL(path)
    train(writer, 1, 4, 0)
    writer.scalars("epoch", 4, 0, {"loss": 1.0})
    train(writer, 5, 3, 1)
    writer.close()
    with open(path, "ab") as file:
        file.write(b'{"split": "train", "step": 8, "ep')  # killed here
    writer = JSONL(path)
    writer.resume(6, 1)
    train(writer, 7, 2, 1)
    writer.close()
    assert [row for row in rows(path) if row[0] == "train"] == [("train", step, int(step > 4)) for step in range(1, 9)]
    assert rows(path).count(("epoch", 4, 0)) == 1


@pytest.mark.parametrize("epoch, kept", [(0, 0), (1, 1)])
def test_the_row_of_an_epoch_stays_if_the_epoch_is_over(tmp_path, epoch, kept):
    path = tmp_path / "metrics.jsonl"
    writer = JSONL(path)
    train(writer, 1, 4, 0)
    writer.scalars("epoch", 4, 0, {"loss": 1.0})
    train(writer, 5, 1, 1)
    writer.close()
    JSONL(path).resume(4, epoch)
    assert len(rows(path)) == 4 + kept


def test_a_run_killed_before_its_first_checkpoint_begins_with_an_empty_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JSONL(path)
    writer.resume(0, 0)
    train(writer, 1, 3)
    writer.close()
    JSONL(path).resume(0, 0)
    assert path.read_bytes() == b""


@settings(max_examples=80)
@given(
    lines=st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=12),
    last=st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")),
    size=st.integers(1, 16),
    data=st.data(),
)
def test_a_file_is_cut_after_the_last_line_to_keep(tmp_path_factory, lines, last, size, data):
    path = tmp_path_factory.mktemp("cut") / "file"
    path.write_bytes(b"".join(line + b"\n" for line in lines) + last)
    kept = set(data.draw(st.lists(st.sampled_from(lines), max_size=2))) if lines else set()
    append_file_block, append_file.BLOCK = append_file.BLOCK, size
    try:
        cut_after(path, lambda line: line in kept)
    finally:
        append_file.BLOCK = append_file_block
    end = max((index + 1 for index, line in enumerate(lines) if line in kept), default=0)
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines[:end])


def test_cutting_a_long_log_reads_its_end_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JSONL(path)
    train(writer, 1, 20_000)
    writer.close()
    seen = []
    cut_after(path, lambda line: seen.append(line) or jsonl._is_before(line, 19_990, 1))
    assert len(seen) == 11
    assert rows(path)[-1][1] == 19_990


def test_garbage_within_a_log_is_passed_over_by_its_reader(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\0\0\0\n[1]\n{"step": 1}\n{"split": "train", "step": 1, "epoch": 0}\n{"sp')
    assert rows(path) == [("train", 1, 0)]
    assert list(jsonl.read(tmp_path / "none")) == []


# A full disk


def test_lines_wait_while_the_disk_is_full_and_none_is_lost_or_halved(tmp_path, monkeypatch, caplog):
    path, real, full = tmp_path / "log", os.write, [True]
    file = AppendFile(path)
    file.append(b"one\n")

    def write(descriptor, data):
        if full[0]:
            if len(data) > 3:
                return real(descriptor, data[:3])  # half a line, then no space
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(append_file.os, "write", write)
    file.append(b"four\n")
    file.append(b"five\n")
    assert path.read_bytes() == b"one\n"
    assert caplog.text.count("cannot be written") == 1
    with pytest.raises(OSError, match="No space"):
        file.flush()
    full[0] = False
    file.append(b"six\n")
    file.close()
    assert path.read_bytes() == b"one\nfour\nfive\nsix\n"


def test_lines_do_not_wait_without_bound(tmp_path, monkeypatch):
    def write(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(append_file.os, "write", write)
    monkeypatch.setattr(append_file, "LARGEST_BACKLOG", 10)
    file = AppendFile(tmp_path / "log")
    file.append(b"12345678\n")
    with pytest.raises(OSError, match="No space"):
        file.append(b"90\n")


def test_a_log_is_not_written_through_a_link(tmp_path):
    (tmp_path / "log").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError):
        AppendFile(tmp_path / "log")
    assert not (tmp_path / "outside").exists()


# CSV


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_table_for_each_split_that_grows_in_width(tmp_path):
    writer = CSV(tmp_path)
    train(writer, 1, 2)
    writer.rows("train", np.array([3]), 0, ["new, name", "loss"], np.array([[7.0, np.nan]], "f"))
    writer.scalars("epoch", 3, 0, {"loss": 0.1})
    writer.close()
    assert table(tmp_path / "train.csv") == [
        {"step": "1", "epoch": "0", "loss": "0.5", "acc": "1.5", "new, name": ""},
        {"step": "2", "epoch": "0", "loss": "1", "acc": "2", "new, name": ""},
        {"step": "3", "epoch": "0", "loss": "nan", "acc": "", "new, name": "7"},
    ]
    assert float(table(tmp_path / "epoch.csv")[0]["loss"]) == 0.1


def test_csv_leaves_out_what_was_not_computed(tmp_path):
    writer = CSV(tmp_path)
    steps, names, values = block(1, 2)
    writer.rows("train", steps, 0, names, values, np.array([[True, False], [True, True]]))
    writer.close()
    assert [row["acc"] for row in table(tmp_path / "train.csv")] == ["", "2"]


def test_csv_goes_on_at_the_step_of_a_resume(tmp_path):
    writer = CSV(tmp_path)
    train(writer, 1, 4)
    writer.scalars("epoch", 4, 0, {"loss": 1.0})
    train(writer, 5, 4, 1)
    writer.close()
    writer = CSV(tmp_path)
    writer.resume(4, 1)
    train(writer, 5, 1, 1)
    writer.close()
    assert [row["step"] for row in table(tmp_path / "train.csv")] == ["1", "2", "3", "4", "5"]
    assert len(table(tmp_path / "epoch.csv")) == 1
    CSV(tmp_path).resume(4, 0)
    assert table(tmp_path / "epoch.csv") == []


# TensorBoard


def events(folder):
    import tensorflow as tf

    for name in sorted(os.listdir(folder)):
        yield from tf.compat.v1.train.summary_iterator(str(folder / name))


def test_tensorboard_gets_scalars_histograms_and_images(tmp_path):
    import tensorflow as tf

    writer = TensorBoard(tmp_path)
    train(writer, 1, 3)
    writer.histogram("h/histogram", 3, [0.0, 1.0, 2.0], [5, 6])
    writer.image("picture", 3, np.full((4, 6, 1), 0.5))
    writer.close()
    first, *found = events(tmp_path)
    assert first.file_version == "brain.Event:2"
    scalars = [(e.step, v.tag, v.simple_value) for e in found[:3] for v in e.summary.value]
    assert scalars[:2] == [(1, "train/loss", 0.5), (1, "train/acc", 1.5)] and len(scalars) == 6
    (histogram,), (image,) = found[3].summary.value, found[4].summary.value
    assert histogram.metadata.plugin_data.plugin_name == "histograms"
    assert tf.make_ndarray(histogram.tensor).tolist() == [[0, 1, 5], [1, 2, 6]]
    decoded = tf.io.decode_png(image.image.encoded_image_string).numpy()
    assert decoded.shape == (4, 6, 1) and np.all(decoded == 128)


def test_tensorboard_gets_few_rows_of_a_block_and_always_the_last(tmp_path):
    writer = TensorBoard(tmp_path)
    train(writer, 1, 1000)
    writer.close()
    assert [event.step for event in events(tmp_path)][1:] == list(range(100, 1001, 100))


def test_tensorboard_is_told_where_a_resume_begins_even_if_the_clock_goes_back(tmp_path):
    import tensorflow as tf

    for now, first in ((2e9, 1), (1e9, 3)):
        writer = TensorBoard(tmp_path, clock=lambda now=now: now)
        if first > 1:
            writer.resume(first - 1, 0)
        train(writer, first, 1)
        writer.close()
    starts = [e.step for e in events(tmp_path) if e.session_log.status == tf.compat.v1.SessionLog.START]
    assert starts == [3]
    assert [e.step for e in events(tmp_path)][-1] == 3, "the newer file comes last"


def test_tensorboards_failure_ends_the_log_and_not_the_training(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    writer = TensorBoard(tmp_path / "tensorboard")
    train(writer, 1, 3)
    train(writer, 4, 3)
    writer.close()
    assert caplog.text.count("ends here") == 1


# Composite, Threaded


def everything(writer):
    train(writer, 1, 2)
    writer.scalars("epoch", 2, 0, {"loss": 1.0})
    writer.histogram("h", 1, [0, 1], [1])
    writer.image("i", 1, np.zeros((1, 1, 1)))
    writer.resume(1, 0)
    writer.flush()
    writer.close()


CALLS = ["rows", "rows", "histogram", "image", "resume", "flush", "close"]


def test_a_composite_hands_everything_to_each():
    first, second = Recorded(), Recorded()
    everything(Composite([first, second]))
    assert [call[0] for call in first.calls] == CALLS
    assert first.calls == second.calls


def test_a_threaded_writer_does_everything_in_order_on_its_thread():
    recorded = Recorded()
    everything(Threaded(recorded))
    assert [call[0] for call in recorded.calls] == CALLS
    assert threading.current_thread() not in recorded.threads and len(recorded.threads) == 1


def test_flushing_waits_until_all_is_written(tmp_path):
    writer = Threaded(JSONL(tmp_path / "metrics.jsonl"))
    for first in range(1, 500, 10):
        train(writer, first, 10)
    writer.flush()
    assert [step for _, step, _ in rows(tmp_path / "metrics.jsonl")] == list(range(1, 501))
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        train(writer, 1, 1)


@pytest.mark.parametrize("then", ["rows", "flush", "close"])
def test_an_error_on_the_thread_surfaces_at_the_next_call(then):
    class Broken(Recorded):
        def rows(self, *args):
            raise OSError("broken")

    inner = Broken()
    writer = Threaded(inner)
    train(writer, 1, 1)
    time.sleep(0.05)
    with pytest.raises(OSError, match="broken"):
        train(writer, 2, 1) if then == "rows" else getattr(writer, then)()
    if then == "close":
        assert inner.calls == [("close",)], "it is closed all the same"


# Curves


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4))
def test_a_curve_of_any_length_is_kept_in_bounded_memory(sizes):
    curve, first = Curve(), 0
    for size in sizes:
        steps = np.arange(first, first + size)
        curve.extend(steps, 2.0 * steps)
        first += size
    assert len(curve.points) <= 2 * POINTS
    np.testing.assert_allclose(curve.points[:, 1], 2 * curve.points[:, 0])
    assert np.all(np.diff(curve.points[:, 0]) > 0)


def test_curves_are_drawn_at_the_end_and_go_on_after_a_resume(tmp_path):
    log, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    writers = [JSONL(log), Curves(picture, log)]
    writer = Composite(writers)
    train(writer, 1, 50)
    writer.scalars("epoch", 50, 0, {"loss": 1.0, "val_loss": math.nan})
    writer.close()
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = Curves(picture, log)
    again.resume(50, 1)
    assert len(again._curves["train", "loss"].points) == 50
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.jsonl"]


def test_curves_cost_a_small_share_of_the_time(tmp_path, monkeypatch):
    now, drawn = [0.0], []

    def draw(curves, path):
        drawn.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr("tfloop.runs.writers.curves.draw", draw)
    writer = Curves(tmp_path / "curves.png", tmp_path / "none", clock=lambda: now[0])
    for _ in range(600):
        train(writer, 1, 1)
        writer.flush()
        now[0] += 1.0
    first, second, third = drawn
    assert first == 0
    assert min(second - first, third - second) >= 1.0 / SHARE  # a drawing takes a second


def test_without_matplotlib_there_is_one_line_and_no_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    writer = Curves(tmp_path / "curves.png", tmp_path / "none")
    for _ in range(2):
        train(writer, 1, 1)
        writer.flush()
    writer.close()
    assert os.listdir(tmp_path) == []
    assert caplog.text.count("matplotlib is not installed") == 1


# Cost


def test_logging_a_step_costs_far_less_than_a_small_step(tmp_path):
    """20 scalars a step, chunks of 1000: some 6 us a row; a small step takes 200."""
    steps, names, values = block(1, 1000, [f"metric_{j}" for j in range(20)])
    values = values + np.random.default_rng(0).random(values.shape).astype("f")
    writer = JSONL(tmp_path / "metrics.jsonl")
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        writer.rows("train", steps, 0, names, values)
        best = min(best, time.perf_counter() - start)
    writer.close()
    assert best / 1000 < 50e-6
