"""A run killed at any moment and started again ends with the same bytes as one that was not."""

import json
import random
import shutil
import signal

import numpy as np
import pytest
from nursery import Nursery

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.fixture(scope="module")
def nursery():
    found = Nursery()
    yield found
    found.close()


@pytest.fixture(scope="module")
def reference(nursery, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert nursery.run(folder) == (0, f"Run folder: {folder}\n")
    return folder


@pytest.fixture(scope="module")
def interrupted(nursery, tmp_path_factory):
    """The folder of a run that was stopped by SIGTERM within an epoch."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    status, said = nursery.run(folder, "--keep=4", pause=0.05, signals=[(0, TERM)], after=has_rows(17))
    assert status == 143 and "finishing the step and saving" in said, said
    assert steps(folder)[-1] == max(checkpoint_steps(folder))
    assert 17 <= steps(folder)[-1] < 28
    return folder


def rows(folder, split="train"):
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in found if row["split"] == split]


def steps(folder):
    return [row["step"] for row in rows(folder)]


def has_rows(count):
    return lambda folder: len(rows(folder)) >= count


def checkpoint_steps(folder):
    return [int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*")]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def assert_same(folder, reference):
    assert summary(folder)["fingerprint"] == summary(reference)["fingerprint"]
    assert summary(folder)["metrics"] == summary(reference)["metrics"]
    assert rows(folder) == rows(reference)
    assert rows(folder, "epoch") == rows(reference, "epoch")


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run")


# Killed


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(nursery, reference, tmp_path, kills):
    rng = random.Random(kills)
    done = 0
    for number in range(kills):
        folder = tmp_path / str(number)
        while True:
            moment = rng.uniform(0, 2.0)
            began = lambda folder: (folder / "config.json").exists()
            kill = [(moment, KILL)] if done < kills else []
            status, said = nursery.run(folder, pause=0.05, signals=kill, after=began if kill else None)
            if status == 0:
                break
            assert status == -KILL, said
            done += 1
        assert_same(folder, reference)
        if done == kills:
            return


def test_rows_are_numbered_from_one_and_say_their_epoch(reference):
    assert steps(reference) == list(range(1, 29))
    assert [row["epoch"] for row in rows(reference)] == sorted(list(range(4)) * 7)
    assert [(row["epoch"], row["step"]) for row in rows(reference, "epoch")] == [(e, 7 * (e + 1)) for e in range(4)]


# Each kind of state counts: left out on purpose, the end differs


@pytest.mark.parametrize(
    "forgotten",
    ["seed_generator", "process/", "moving_", "average/", "optimizer/", "updates", "convolution/", "position"],
)
def test_a_state_that_is_left_out_is_missed(nursery, reference, interrupted, tmp_path, forgotten):
    folder = copied(interrupted, tmp_path)
    status, said = nursery.run(folder, forget=forgotten)
    assert status == 0, said
    assert summary(folder)["fingerprint"] != summary(reference)["fingerprint"]


def test_metrics_within_the_epoch_are_state_too(nursery, reference, interrupted, tmp_path):
    folder = copied(interrupted, tmp_path)
    status, said = nursery.run(folder, forget="metrics/")
    assert status == 0, said
    assert summary(folder)["fingerprint"] == summary(reference)["fingerprint"]
    assert rows(folder, "epoch") != rows(reference, "epoch")


# Damaged


def flip(path):
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "tensors.safetensors").write_bytes(data)


def truncate(path):
    with open(path / "tensors.safetensors", "rb+") as file:
        file.truncate(100)


def empty(path):
    (path / "tensors.safetensors").write_bytes(b"")


def lose(path):
    (path / "tensors.safetensors").unlink()


def lose_the_manifest(path):
    (path / "manifest.json").unlink()


def garble_the_manifest(path):
    (path / "manifest.json").write_bytes(b"\x00\xff{{{")


@pytest.mark.parametrize("damages", [(flip, truncate), (empty, lose), (lose_the_manifest, garble_the_manifest)])
def test_damaged_checkpoints_are_passed_over(nursery, reference, interrupted, tmp_path, damages):
    folder = copied(interrupted, tmp_path)
    newest = sorted((folder / "checkpoints").glob("step-*"))[::-1]
    for damage, path in zip(damages, newest, strict=False):
        damage(path)
    status, said = nursery.run(folder)
    assert status == 0 and said.count("is damaged and skipped") == 2, said
    assert sorted(p.name for p in (folder / "checkpoints" / "damaged").iterdir()) == sorted(p.name for p in newest[:2])
    assert_same(folder, reference)


def test_if_all_are_damaged_nothing_is_changed(nursery, interrupted, tmp_path):
    folder = copied(interrupted, tmp_path)
    paths = sorted((folder / "checkpoints").glob("step-*"))
    for path in paths:
        flip(path)
    before = contents(folder)
    status, said = nursery.run(folder)
    assert status == 2
    assert all(path.name in said for path in paths) and "--resume=restart" in said
    assert contents(folder) == before


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


# Stopped


def test_after_sigterm_it_goes_on(nursery, reference, interrupted, tmp_path):
    folder = copied(interrupted, tmp_path)
    status, said = nursery.run(folder)
    assert status == 0 and "goes on in epoch" in said, said
    assert_same(folder, reference)


def test_ctrl_c_saves_and_a_second_one_does_not_wait(nursery, reference, tmp_path):
    folder = tmp_path / "run"
    status, said = nursery.run(folder, pause=0.05, signals=[(0, INT)], after=has_rows(5))
    assert status == 130 and "once more to stop at once" in said, said
    assert steps(folder)[-1] == max(checkpoint_steps(folder))
    began = len(rows(folder))
    status, said = nursery.run(folder, pause=3, signals=[(0.1, INT), (0.3, INT)], after=has_rows(began + 1))
    assert status == 130, said
    assert nursery.run(folder)[0] == 0
    assert_same(folder, reference)


def test_an_error_of_a_callback_keeps_the_step_before_it(nursery, reference, tmp_path):
    folder = tmp_path / "run"
    status, said = nursery.run(folder, fail=11)
    assert status == 1 and "the callback failed" in said and "Traceback" in said, said
    assert max(checkpoint_steps(folder)) == 11
    assert nursery.run(folder)[0] == 0
    assert_same(folder, reference)


# Refused, and done


def test_a_finished_run_says_so(nursery, reference, tmp_path):
    folder = copied(reference, tmp_path)
    before = contents(folder)
    status, said = nursery.run(folder)
    assert status == 0 and "is finished: 28 steps are done" in said
    assert contents(folder) == before


def test_other_flags_are_refused_with_the_difference(nursery, interrupted, tmp_path):
    folder = copied(interrupted, tmp_path)
    before = contents(folder)
    status, said = nursery.run(folder, "--batch_size=8", "--seed=7", "--epochs=5")
    assert status == 2
    assert "flags/batch_size: 16 -> 8" in said and "flags/seed: 0 -> 7" in said and "epochs" not in said
    assert contents(folder) == before
    assert nursery.run(folder, "--resume=never")[0] == 2


def test_sigterm_within_a_validation_does_not_wait_for_it(nursery, reference, tmp_path):
    folder = tmp_path / "run"
    status, said = nursery.run(folder, pause_test=3.0, signals=[(1.0, TERM)], after=has_rows(7))
    assert status == 143, said
    assert steps(folder) == list(range(1, 8)) and rows(folder, "epoch") == []
    assert nursery.run(folder)[0] == 0
    assert_same(folder, reference)


# A full disk


def test_a_disk_that_is_full_for_a_while_loses_nothing(nursery, reference, tmp_path):
    folder = tmp_path / "run"
    status, said = nursery.run(folder, full=5)  # all four attempts of one checkpoint, and the first of the next
    assert status == 0 and "was not written" in said, said
    assert_same(folder, reference)


def test_a_disk_that_stays_full_ends_the_run(nursery, tmp_path):
    folder = tmp_path / "run"
    nursery.run(folder, "--epochs=1")
    good = checkpoint_steps(folder)
    status, said = nursery.run(folder, full=1000)
    assert status == 1 and "No space left on device" in said and "Traceback" not in said, said
    assert set(checkpoint_steps(folder)) & set(good)


# Numbers that are not finite


def test_skipping_leaves_out_what_is_not_finite(nursery, tmp_path):
    folder = tmp_path / "run"
    status, said = nursery.run(folder, "--on_nan=skip", poison=50)
    assert status == 0 and said.count("was skipped: nothing moved") == 4, said
    assert summary(folder)["steps"] == 24 and summary(folder)["skipped_steps"] == 4
    assert steps(folder) == list(range(1, 25))
    assert all(row["loss"] is not None for row in rows(folder))


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_stop_and_rollback_name_the_first_bad_tensor(nursery, tmp_path, policy):
    folder = tmp_path / "run"
    status, said = nursery.run(folder, f"--on_nan={policy}", poison=50)
    report = json.loads(next((folder / "nonfinite").glob("*.json")).read_text())
    assert report["report"]["name"] == "x" and 50 in report["indices"], said
    with np.load(next((folder / "nonfinite").glob("*.npz"))) as saved:
        assert np.isnan(saved["x"]).any() and 50 in saved["indices"]
    assert f"Step {report['step']} (batch {report['batch']} of epoch {report['epoch']})" in said
    if policy == "stop":
        assert status == 1 and "Traceback" not in said
        assert max(checkpoint_steps(folder)) == report["step"] - 1
    else:
        assert status == 0 and said.count("is left out") == 4, said
        assert summary(folder)["steps"] == 24 and steps(folder) == list(range(1, 25))


def test_what_was_rolled_back_stays_left_out_after_a_kill(nursery, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    how = {"poison": 50, "pause": 0.03}
    assert nursery.run(whole, "--on_nan=rollback", **how)[0] == 0
    status, said = nursery.run(killed, "--on_nan=rollback", signals=[(0.05, KILL)], after=has_rows(12), **how)
    assert status == -KILL, said
    assert nursery.run(killed, "--on_nan=rollback", **how)[0] == 0
    assert_same(killed, whole)


def test_more_epochs_later_are_as_good_as_all_at_once(nursery, reference, tmp_path):
    """The optimizer's average, which a finished training puts into the weights, does not stay in them."""
    folder = tmp_path / "run"
    assert nursery.run(folder, "--epochs=2")[0] == 0
    assert nursery.run(folder, "--epochs=4")[0] == 0
    assert_same(folder, reference)
