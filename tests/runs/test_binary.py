"""The classifier's command line: what the flags do, in a process of its own."""

import json
import os
import subprocess
import sys

import keras
import pytest
from saver import REPOSITORY

from tfloop.runs import binary
from tfloop.runs.errors import Refused


def classifier(folder, *flags, status=0):
    """Runs the classifier; returns what it said."""
    command = [sys.executable, "-m", "experiments.classifier", f"--workdir={folder}", "--progress=none", *flags]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent, timeout=180)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_default_run_learns_the_digits(tmp_path):
    folder = tmp_path / "run"
    classifier(folder, "--log=tensorboard,csv", "--profile")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["val_accuracy"] >= 0.97 and summary["metrics"]["hidden_norm"] > 1
    assert summary.keys() == {"metrics", "steps", "epochs", "seconds", "engine", "fingerprint"}
    config = json.loads((folder / "config.json").read_text())
    assert {"flags", "versions", "seed", "threads", "engine"} <= config.keys()
    assert config["engine"] == summary["engine"] and config["flags"]["batch_size"] == 32
    rows = records(folder)
    assert [r["step"] for r in rows if r["split"] == "train"] == list(range(1, summary["steps"] + 1))
    assert [r["epoch"] for r in rows if r["split"] == "epoch"] == list(range(summary["epochs"]))
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "csv" / "train.csv").exists() and list((folder / "tensorboard").rglob("*.xplane.pb"))


def test_watches_and_parametrisations_need_no_code(tmp_path):
    folder = tmp_path / "run"
    flags = ["--watch=gradients/*/kernel=norm", "--watch=*=rms", "--parametrize=*/kernel=spectral_norm"]
    classifier(folder, "--epochs=1", "--jit=off", "--watch=hidden=histogram", *flags)
    first = records(folder)[0]
    assert {"gradients/hidden/kernel/norm", "gradients/logits/kernel/norm", "hidden/rms", "logits/rms"} <= first.keys()
    assert json.loads((folder / "summary.json").read_text())["engine"] == "graph"


@pytest.mark.parametrize(
    ("flag", "status", "said"),
    [
        ("--watch=nope/*=rms", 2, "'hidden'"),
        ("--parametrize=nope/kernel=spectral_norm", 2, "'hidden/kernel'"),
        ("--bacth_size=3", 1, "batch_size"),
        ("--learning_rate=nan", 1, "learning_rate"),
        ("stray", 2, "stray"),
        ("--strategy=multiworker", 2, "--strategy"),
        ("--workdir=/proc/nowhere", 2, "/proc/nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(tmp_path, flag, status, said):
    heard = classifier(tmp_path / "run", flag, status=status)
    assert said in heard and "Traceback" not in heard, heard
    assert not (tmp_path / "run").exists()


def test_rehearsals_write_nothing(tmp_path):
    heard = classifier(tmp_path / "run", "--dry_run", "--watch=*=rms", "--accumulate=7")
    for said in (
        "7 steps of 7 batches an epoch",
        "float32[32, 8, 8, 1]",
        "7,510 parameters",
        "gradients/hidden/kernel",
        "hidden/rms",
        "hidden_norm",
    ):
        assert said in heard
    assert "bit for bit" in classifier(tmp_path / "run", "--verify")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("flags", "batches"), [([], 45), (["--overfit_one_batch"], 1)])
def test_one_batch_is_the_same_in_every_step(tmp_path, flags, batches):
    """With a rate that moves no weight, losses tell batches apart."""
    classifier(tmp_path / "run", "--epochs=1", "--learning_rate=1e-30", "--log=", *flags)
    losses = [row["loss"] for row in records(tmp_path / "run") if row["split"] == "train"]
    assert len(losses) == 45 and len(set(losses)) == batches


def test_without_a_workdir_every_run_has_a_new_folder(tmp_path):
    for number in (1, 2):
        heard = classifier(
            tmp_path / "x", "--workdir=", "--epochs=1", "--overfit_one_batch", "--deterministic", "--log="
        )
        assert f"Run folder: runs/classifier/{number}" in heard
    folders = sorted((tmp_path / "runs" / "classifier").iterdir())
    assert [folder.name for folder in folders] == ["1", "2"]
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert first["fingerprint"] == second["fingerprint"]  # deterministic


@pytest.mark.parametrize("flag", ["--deterministic", "--nodeterministic"])
def test_operations_are_deterministic_if_asked_for(flag):
    code = """
from absl import app
import tfloop
from tfloop import _keras
tfloop.binary.define_flags()
app.run(lambda argv: print(_keras.are_operations_deterministic()))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", code, flag]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.stdout.strip() == str(flag == "--deterministic"), done.stderr


def test_the_readmes_own_binary_runs(tmp_path):
    section = (REPOSITORY / "README.md").read_text().split("## Training binaries")[1]
    code = section.split("```python no-run\n")[1].split("```")[0]
    assert len(code.splitlines()) < 30
    (tmp_path / "own.py").write_text(code)
    command = [sys.executable, "own.py", "--epochs=2", "--units=4", "--watch=hidden=rms", "--accumulate=2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=180)
    assert done.returncode == 0 and "Trained in" in done.stdout, done.stderr
    assert json.loads((tmp_path / "runs" / "own" / "1" / "summary.json").read_text())["steps"] == 14


def test_the_learning_rate_is_that_of_the_optimizer_within_a_loss_scale():
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    binary._set_learning_rate(scaled, 0.02)
    assert float(scaled.inner_optimizer.learning_rate) == pytest.approx(0.02)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    binary._set_learning_rate(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(schedule)), 0.02)


def test_a_learning_rate_for_several_optimizers_is_refused():
    several = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1)))
    with pytest.raises(Refused, match="MultiOptimizer"):
        binary._set_learning_rate(several, 0.02)
