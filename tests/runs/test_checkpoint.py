"""Checkpoints: written whole, kept, found again, and never believed."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from tfloop.runs import checkpoint as module
from tfloop.runs import checkpoint_file, files
from tfloop.runs.checkpoint import ATTEMPTS, GIVE_UP, Checkpoints
from tfloop.runs.errors import (
    CheckpointError,
    CheckpointMismatch,
    FolderError,
    NoUsableCheckpoint,
)

SAVER = Path(__file__).with_name("saver.py")
POINTS = ["begin", "half of the tensors", "tensors", "manifest", "folder", "renamed", "committed"]


def state(step):
    return {"w": np.full((3, 4), step, "f"), "n": np.array(step)}


def filled(folder, steps=(1, 2, 3), **kwargs):
    checkpoints = Checkpoints(folder, **{"keep": None, "sleep": lambda seconds: None, **kwargs})
    for step in steps:
        checkpoints.save(step, state(step), {"epoch": step}, wait=True)
    return checkpoints


def names(folder):
    return sorted(os.listdir(folder))


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


# What comes back


DTYPES = [*checkpoint_file.NUMPY_DTYPES, *checkpoint_file.ML_DTYPES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, dtype, shape):
    value = np.ones(shape, checkpoint_file.dtype_of(dtype))
    Checkpoints(tmp_path).save(1, {"a/b": value}, {}, wait=True)
    assert same(Checkpoints(tmp_path).restore_latest().tensors, {"a/b": value})


arrays = nps.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]),
    nps.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25)
@given(tensors=st.dictionaries(st.text(min_size=1), arrays, max_size=4), manifest=jsons)
def test_any_state_and_manifest_come_back(tmp_path_factory, tensors, manifest):
    folder = tmp_path_factory.mktemp("checkpoints")
    Checkpoints(folder).save(7, tensors, manifest, wait=True)
    restored = Checkpoints(folder).restore_latest()
    assert same(restored.tensors, tensors)
    assert repr(restored.manifest) == repr(manifest)  # by repr: a NaN is not equal to itself


def test_arrays_that_are_views_come_back_in_their_order(tmp_path):
    value = np.arange(12.0).reshape(3, 4).T[::2]
    Checkpoints(tmp_path).save(1, {"w": value}, {}, wait=True, copy=False)
    np.testing.assert_array_equal(Checkpoints(tmp_path).restore_latest().tensors["w"], value)


def test_the_library_reads_the_file(tmp_path):
    tensors = {
        "flag": np.array([True]),
        "half": np.arange(3, dtype=np.float16),
        "w": np.arange(6.0).reshape(2, 3),
        "big-endian": np.arange(4, dtype=">i4"),
        "none": np.zeros((0, 3), np.float32),
        "step": np.int64(7),
    }
    Checkpoints(tmp_path).save(1, tensors, {}, wait=True)
    path = tmp_path / "step-0000000001" / checkpoint_file.TENSORS
    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor)
    header = json.loads(path.read_bytes()[8:].partition(b"}}")[0] + b"}}")
    assert all(entry["data_offsets"][0] % loaded[name].itemsize == 0 for name, entry in header.items())


def test_the_state_is_copied_out_before_save_returns(tmp_path):
    go = threading.Event()
    checkpoints = Checkpoints(tmp_path, at=lambda point: go.wait(10))
    tensors, manifest = state(1), {"history": [1]}
    checkpoints.save(1, tensors, manifest)
    assert checkpoints.busy
    tensors["w"][:] = 99  # the next step
    manifest["history"].append(2)
    go.set()
    checkpoints.wait()
    assert not checkpoints.busy
    restored = checkpoints.restore_latest()
    assert same(restored.tensors, state(1)) and restored.manifest == {"history": [1]}


def test_at_most_one_save_is_in_flight(tmp_path):
    running, most = [0], [0]

    def at(point):
        running[0] += {"begin": 1, "pruned": -1}.get(point, 0)
        most[0] = max(most[0], running[0])

    checkpoints = Checkpoints(tmp_path, at=at)
    for step in range(5):
        checkpoints.save(step, state(step), {})
    checkpoints.wait()
    assert most[0] == 1
    assert checkpoints.steps() == [2, 3, 4]


def test_logs_are_flushed_before_the_checkpoint_is_visible(tmp_path):
    seen = []
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {}, before_commit=lambda: seen.append(checkpoints.steps()), wait=True)
    assert seen == [[]]


def test_what_cannot_be_saved_is_an_error_at_once(tmp_path):
    with pytest.raises(TypeError, match="'names' of dtype object"):
        Checkpoints(tmp_path).save(1, {"names": np.array([None])}, {})
    with pytest.raises(TypeError):
        Checkpoints(tmp_path).save(1, {}, {"fn": print})


def test_no_checkpoint_is_no_error(tmp_path):
    assert Checkpoints(tmp_path / "none").restore_latest() is None
    assert names(tmp_path) == []


# Keeping


def test_the_last_n_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, best=("accuracy", "max"))
    for step, accuracy in enumerate([0.1, 0.9, 0.3, float("nan"), 0.5, 0.4]):
        checkpoints.save(step, state(step), {}, {"accuracy": accuracy}, wait=True)
    assert checkpoints.steps() == [1, 4, 5]
    again = Checkpoints(tmp_path, keep=1, best="accuracy")  # another process, the minimum now
    again.save(6, state(6), {}, {"accuracy": 0.7}, wait=True)
    assert again.steps() == [5, 6]


@settings(max_examples=20)
@given(
    scores=st.lists(st.none() | st.floats(), min_size=1, max_size=8),
    keep=st.integers(1, 3),
    mode=st.sampled_from(["min", "max"]),
)
def test_retention_is_the_last_n_and_the_best(tmp_path_factory, scores, keep, mode):
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder, keep=keep, best=("m", mode))
    for step, score in enumerate(scores):
        checkpoints.save(step, {}, {}, {} if score is None else {"m": score}, wait=True)
    kept = checkpoints.steps()
    assert kept[-keep:] == list(range(len(scores)))[-keep:]
    finite = [s for s in scores if s is not None and np.isfinite(s)]
    if finite:
        best = min(finite) if mode == "min" else max(finite)
        assert best in [scores[step] for step in kept]
    assert len(kept) <= keep + 1


def test_order_is_by_step_and_not_by_time(tmp_path):
    filled(tmp_path, [3, 12, 2])
    for name in names(tmp_path):
        os.utime(tmp_path / name, (1, 1) if "12" in name else None)
    assert Checkpoints(tmp_path).restore_latest().step == 12
    assert Checkpoints(tmp_path).restore_latest(before=12).step == 3
    assert filled(tmp_path, [10_000_000_000]).restore_latest().step == 10_000_000_000


def test_a_second_checkpoint_of_a_step_replaces_the_first(tmp_path):
    checkpoints = filled(tmp_path, [1])
    checkpoints.save(1, state(5), {"again": True}, wait=True)
    assert checkpoints.restore_latest().manifest == {"again": True}
    assert names(tmp_path) == ["step-0000000001-1"]


def test_what_came_after_a_step_can_be_discarded(tmp_path):
    checkpoints = filled(tmp_path)
    checkpoints.discard_after(1)
    assert checkpoints.steps() == [1]


def test_a_folder_with_files_of_others_is_never_deleted(tmp_path):
    checkpoints = filled(tmp_path, [1])
    (tmp_path / "step-0000000001" / "notes.txt").write_text("mine")
    checkpoints.keep = 1
    checkpoints.save(2, state(2), {}, wait=True)
    assert checkpoints.steps() == [1, 2]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_new_one(tmp_path, monkeypatch, caplog):
    checkpoints = filled(tmp_path, [1])
    checkpoints.keep = 1

    def rename(source, target):
        if ".trash" in str(target):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        os.replace(source, target)

    monkeypatch.setattr(module.os, "rename", rename)
    checkpoints.save(2, state(2), {}, wait=True)
    assert checkpoints.steps() == [1, 2]
    assert "cannot be deleted" in caplog.text


# Killed


def saver(folder, point, steps, **kwargs):
    command = [sys.executable, str(SAVER), str(folder), point, steps]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


@pytest.mark.parametrize("point", POINTS)
def test_killed_within_a_save_the_old_or_the_new_one_is_there(tmp_path, point):
    folder = tmp_path / "checkpoints"
    assert saver(folder, point, "1,2,3").returncode == -signal.SIGKILL
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.sweep()
    assert [name for name in names(folder) if name.startswith(".")] == []
    restored = checkpoints.restore_latest()
    assert restored.step == (3 if point in ("renamed", "committed") else 2)
    assert np.all(restored.tensors["w"] == restored.step)
    checkpoints.save(4, state(4), {}, wait=True)
    assert checkpoints.steps()[-1] == 4


def test_the_kill_does_hit_a_half_written_file(tmp_path):
    saver(tmp_path, "half of the tensors", "1,2")
    assert names(tmp_path / ".writing-step-0000000002") == [checkpoint_file.TENSORS]
    half, whole = (
        (tmp_path / name / checkpoint_file.TENSORS).stat().st_size
        for name in (".writing-step-0000000002", "step-0000000001")
    )
    assert half < whole


def test_killed_within_the_first_save_is_as_never_started(tmp_path):
    saver(tmp_path, "manifest", "1")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.sweep()
    assert checkpoints.restore_latest() is None
    assert names(tmp_path) == []


def test_killed_within_a_deletion_leaves_nothing_that_looks_damaged(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path, [1, 2])
    monkeypatch.setattr(module.os, "unlink", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.discard_after(1)
    monkeypatch.undo()
    assert checkpoints.steps() == [1]
    checkpoints.sweep()
    assert names(tmp_path) == ["step-0000000001"]


def test_sweeping_touches_nothing_but_leftovers(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / checkpoint_file.TENSORS).write_text("precious")
    folder = tmp_path / "checkpoints"
    filled(folder, [1])
    (folder / ".writing-step-0000000002").symlink_to(outside)
    (folder / ".writing-step-0000000003").mkdir()
    (folder / ".writing-step-0000000003" / "other").write_text("not ours")
    (folder / "notes").mkdir()
    Checkpoints(folder).sweep()
    assert (outside / checkpoint_file.TENSORS).read_text() == "precious"
    assert (folder / ".writing-step-0000000003" / "other").exists()
    assert (folder / "notes").exists()


def test_everything_is_flushed_before_and_after_the_rename(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    result = saver(folder, "none", "1,2")
    assert result.returncode == 0, result.stderr
    synced = [os.path.relpath(path, tmp_path) for path in result.stdout.split()]
    aside = "run/checkpoints/.writing-step-000000000"
    assert synced == [
        *(".", "run"),  # the names of the new folders
        *(
            f"{aside}1/tensors.safetensors",
            f"{aside}1/manifest.json",
            f"{aside}1",
            "run/checkpoints",
        ),
        *(
            f"{aside}2/tensors.safetensors",
            f"{aside}2/manifest.json",
            f"{aside}2",
            "run/checkpoints",
        ),
    ]


# Failing


def full(point):
    if point == "tensors":
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_for_a_while_costs_old_checkpoints_only(tmp_path):
    pauses, failing = [], [2]
    checkpoints = filled(tmp_path, [1, 2, 3], sleep=pauses.append)

    def at(point):
        if point == "tensors" and failing[0]:
            failing[0] -= 1
            full(point)

    checkpoints._at = at
    checkpoints.save(4, state(4), {}, wait=True)
    assert checkpoints.steps() == [3, 4]
    assert pauses == [0.1, 0.4]
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_a_disk_that_stays_full_stops_training_after_a_number_of_saves(tmp_path, caplog):
    checkpoints = filled(tmp_path, [1, 2])
    checkpoints._at = full
    for step in range(3, 3 + GIVE_UP):
        checkpoints.save(step, state(step), {})
    with pytest.raises(CheckpointError, match=f"{GIVE_UP} checkpoints in a row.*No space left"):
        checkpoints.save(99, state(99), {})
    assert checkpoints.restore_latest().step == 2
    assert caplog.text.count("was not written") == GIVE_UP
    assert caplog.text.count("is tried again") == GIVE_UP * (ATTEMPTS - 1)


def test_a_failure_that_passes_is_forgotten(tmp_path):
    checkpoints = filled(tmp_path, [1])
    for step in range(2, 2 + 2 * GIVE_UP):
        checkpoints._join()
        checkpoints._at = full if step % 2 else module.nowhere
        checkpoints.save(step, state(step), {})
    checkpoints._join()
    assert checkpoints.saved_step == 10


def test_waiting_for_a_save_that_failed_is_an_error(tmp_path):
    checkpoints = filled(tmp_path, [1], at=lambda point: None)
    checkpoints._at = full
    checkpoints.save(2, state(2), {})
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.wait()
    checkpoints.wait()  # told once


def test_a_failure_that_will_not_pass_surfaces_at_the_next_save(tmp_path):
    def broken():
        raise KeyError("flush")

    checkpoints = filled(tmp_path, [1])
    checkpoints.save(2, state(2), {}, before_commit=broken)
    with pytest.raises(CheckpointError, match="KeyError"):
        checkpoints.save(3, state(3), {})
    assert checkpoints.steps() == [1]


def test_a_file_that_may_not_grow_keeps_the_last_good_checkpoint(tmp_path):
    result = saver(tmp_path, "limit", "1,2,3")
    assert "CheckpointError" in result.stdout and "File too large" in result.stdout
    restored = Checkpoints(tmp_path).restore_latest()
    assert restored.step == 2 and np.all(restored.tensors["w"] == 2)
    assert names(tmp_path) == ["step-0000000002"]


def test_a_file_system_that_is_full_keeps_the_last_good_checkpoint(tmp_path):
    python = f"{sys.executable} {SAVER} {tmp_path} none 1,2,3,4"
    script = f"mount -t tmpfs -o size=300k tmpfs {tmp_path} && {python} && ls -a {tmp_path}"
    command = ["unshare", "--mount", "sh", "-c", script]
    if not shutil.which("unshare") or subprocess.run([*command[:2], "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    # Three do not fit: from the third on an old one makes room.
    assert result.returncode == 0, result.stderr
    assert "step-0000000004" in result.stdout and ".writing" not in result.stdout.split("\n.\n")[1]
    assert "No space left" in result.stderr


# Damaged


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def garble(path):
    path.write_bytes(b"\xff\x00 garbage")


def replace_by_link(path):
    path.rename(path.parent.parent / f"hidden-{path.name}")
    path.symlink_to(path.parent.parent / f"hidden-{path.name}")


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def pickled(path):
    path.write_bytes(pickle.dumps(print))


DAMAGES = [flip, truncate, empty, remove, garble, replace_by_link, replace_by_pipe, pickled]


@pytest.mark.parametrize("file", [checkpoint_file.TENSORS, checkpoint_file.MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_skipped_and_kept(tmp_path, damage, file, caplog):
    checkpoints = filled(tmp_path)
    damage(tmp_path / "step-0000000003" / file)
    restored = checkpoints.restore_latest()
    assert restored.step == 2 and same(restored.tensors, state(2))
    assert names(tmp_path / "damaged") == ["step-0000000003"]
    assert "step-0000000003 is damaged and skipped" in caplog.text
    checkpoints.save(3, state(3), {}, wait=True)
    flip(tmp_path / "step-0000000003" / file)
    assert checkpoints.restore_latest().step == 2
    assert names(tmp_path / "damaged") == ["step-0000000003", "step-0000000003.1"]


@settings(max_examples=60)
@given(data=st.data())
def test_any_flipped_byte_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("checkpoints")
    filled(folder, [1])
    path = folder / "step-0000000001" / data.draw(st.sampled_from(["tensors.safetensors", "manifest.json"]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        restored = Checkpoints(folder).restore_latest()
    except NoUsableCheckpoint:
        return
    # What lies outside of the content (white space around it) may change.
    assert same(restored.tensors, state(1)) and restored.manifest == {"epoch": 1}


def test_all_damaged_stops_with_a_list_and_changes_nothing(tmp_path):
    checkpoints = filled(tmp_path)
    flip(tmp_path / "step-0000000001" / checkpoint_file.TENSORS)
    truncate(tmp_path / "step-0000000002" / checkpoint_file.TENSORS)
    remove(tmp_path / "step-0000000003" / checkpoint_file.MANIFEST)
    before = names(tmp_path)
    for _ in range(2):  # asked again it is the same
        with pytest.raises(NoUsableCheckpoint) as caught:
            checkpoints.restore_latest()
        text = str(caught.value)
        assert "step-0000000001: tensors.safetensors does not have the SHA-256" in text
        assert "step-0000000002: tensors.safetensors has" in text
        assert "step-0000000003: manifest.json: No such file" in text
        assert names(tmp_path) == before


def test_a_folder_where_only_damaged_ones_are_left_is_not_a_new_run(tmp_path):
    checkpoints = filled(tmp_path, [1, 2])
    flip(tmp_path / "step-0000000002" / checkpoint_file.TENSORS)
    assert checkpoints.restore_latest().step == 1
    shutil.rmtree(tmp_path / "step-0000000001")
    with pytest.raises(NoUsableCheckpoint, match="damaged/step-0000000002"):
        checkpoints.restore_latest()


@pytest.mark.parametrize("name", ["step-abc", "step-1x"])
def test_what_only_looks_like_a_checkpoint_is_not_passed_over(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(NoUsableCheckpoint, match=name):
        Checkpoints(tmp_path).restore_latest()


# Hostile


def forge(folder, change):
    """Rewrites a manifest with a right hash, as somebody who knows the format would."""
    path = folder / checkpoint_file.MANIFEST
    content = json.loads(path.read_text())["content"]
    change(content)
    text = json.dumps(content)
    path.write_text(json.dumps({"sha256": checkpoint_file._sha256(text), "content": content}))


def set_shape(shape, dtype="float32"):
    return lambda content: content["tensors"].update(w=[dtype, shape])


def name_file(name):
    return lambda content: content.update(files={name: content["files"][checkpoint_file.TENSORS]})


def set_size(size):
    return lambda content: content["files"][checkpoint_file.TENSORS].update(size=size)


FORGERIES = {
    "a name with ..": (name_file("../../etc/passwd"), "outside the checkpoint"),
    "an absolute name": (name_file("/etc/passwd"), "outside the checkpoint"),
    "the folder above": (name_file(".."), "outside the checkpoint"),
    "another file": (name_file("weights.pkl"), "other files"),
    "a wrong size": (set_size(10**15), "bytes, not"),
    "no size": (set_size(None), "no size"),
    "a huge shape": (set_shape([10**9, 10**9]), "too small for the shapes"),
    "another shape": (set_shape([4, 3]), "declared"),
    "another dtype": (set_shape([3, 4], "uint8"), "declared"),
    "a negative shape": (set_shape([-1, 4]), "declared"),
    "a shape of floats": (set_shape([3.0, 4]), "declared"),
    "Python objects": (set_shape([3, 4], "object"), "declared"),
    "another step": (lambda content: content.update(step=7), "of step 7"),
    "another format": (lambda content: content.update(format=2), "of format 2"),
    "no tensors": (lambda content: content.pop("tensors"), "cannot be read"),
    "a tensor less": (lambda content: content["tensors"].pop("w"), "does not hold the tensors"),
}


@pytest.mark.parametrize("change, why", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_manifest_is_refused(tmp_path, change, why):
    filled(tmp_path, [1])
    forge(tmp_path / "step-0000000001", change)
    with pytest.raises(NoUsableCheckpoint, match=why):
        Checkpoints(tmp_path).restore_latest()


def test_a_manifest_forged_without_a_change_is_accepted(tmp_path):
    filled(tmp_path, [1])
    forge(tmp_path / "step-0000000001", lambda content: None)  # the forgeries fail for their reasons
    assert Checkpoints(tmp_path).restore_latest().step == 1


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", "[]", '{"sha256": 1}', '"x"'])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, text):
    filled(tmp_path, [1])
    (tmp_path / "step-0000000001" / checkpoint_file.MANIFEST).write_text(text)
    with pytest.raises(NoUsableCheckpoint):
        Checkpoints(tmp_path).restore_latest()


def test_nothing_is_reached_through_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    filled(elsewhere, [1])
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-0000000001").symlink_to(elsewhere / "step-0000000001")
    with pytest.raises(NoUsableCheckpoint, match="link"):
        Checkpoints(folder).restore_latest()
    (tmp_path / "link").symlink_to(elsewhere)
    with pytest.raises(FolderError, match="link"):
        Checkpoints(tmp_path / "link", sleep=lambda s: None)._make_folder()
    (elsewhere / "damaged").symlink_to(tmp_path)
    filled(elsewhere, [2])
    flip(elsewhere / "step-0000000002" / checkpoint_file.TENSORS)
    with pytest.raises(FolderError, match="link"):
        Checkpoints(elsewhere).restore_latest()


# Another model


def test_another_model_is_refused_with_what_differs_both_ways(tmp_path):
    checkpoints = filled(tmp_path, [1])
    model = {"w": np.zeros((3, 5), "f"), "extra": np.zeros(2)}
    with pytest.raises(CheckpointMismatch) as caught:
        checkpoints.restore_latest(expect=model)
    text = str(caught.value)
    assert "'n' int64[] is in the checkpoint only" in text
    assert "'extra' float64[2] is in the model only" in text
    assert "'w' is float32[3, 4] in the checkpoint and float32[3, 5] in the model" in text
    assert names(tmp_path) == ["step-0000000001"], "it is not damaged"


def test_another_dtype_is_another_model(tmp_path):
    checkpoints = filled(tmp_path, [1])
    with pytest.raises(CheckpointMismatch, match=r"float32.* in the checkpoint and bfloat16"):
        checkpoints.restore_latest(expect=state(1) | {"w": np.zeros((3, 4), ml_dtypes.bfloat16)})


def test_what_fits_is_taken_if_asked_for(tmp_path):
    checkpoints = filled(tmp_path, [1])
    restored = checkpoints.restore_latest({"w": np.zeros((3, 4), "f"), "x": np.zeros(1)}, partial=True)
    assert same(restored.tensors, {"w": state(1)["w"]})
    assert len(restored.skipped) == 2


def test_metrics_and_positions_are_not_compared_with_the_model(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1) | {"metrics/a": np.zeros(1), "loop/sums": np.zeros(2)}, {}, wait=True)
    restored = checkpoints.restore_latest(expect=state(0))
    assert set(restored.tensors) == {"w", "n", "metrics/a", "loop/sums"}


def test_variables_of_keras_are_compared_like_arrays(tmp_path):
    keras = pytest.importorskip("keras")
    import tensorflow as tf

    filled(tmp_path, [1])
    model = {"w": keras.Variable(np.zeros((3, 4), "f")), "n": tf.Variable(0, dtype=tf.int64)}
    assert Checkpoints(tmp_path).restore_latest(expect=model).skipped == []


@pytest.mark.parametrize("kwargs", [{"keep": 0}, {"best": ("loss", "least")}])
def test_options_that_make_no_sense_are_refused(tmp_path, kwargs):
    with pytest.raises(ValueError):
        Checkpoints(tmp_path, **kwargs)


def test_json_is_strict_and_keeps_what_is_not_finite():
    text = files.to_json({"best": float("inf"), "n": np.float32(1.5)})
    json.loads(text, parse_constant=lambda name: 1 / 0)
    assert files.from_json(text) == {"best": float("inf"), "n": 1.5}
