"""The autoencoder experiment: a loss on tensors without targets, and what it reaches."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.autoencoder.model import build
from experiments.data import images


def test_its_loss_is_the_squared_error_and_needs_no_target():
    x = images()[0][0][:32]
    model = build(x.shape[1:], hidden=8, code=3)
    model.compile("adam")
    error = np.mean((model.predict(x, verbose=0) - x) ** 2)
    np.testing.assert_allclose(model.evaluate(x, None, verbose=0, return_dict=True)["loss"], error, rtol=1e-5)
    assert list(model.fit(x, None, verbose=0).history) == ["loss", "code_norm"]


def run(folder, *arguments):
    command = [sys.executable, "-m", "experiments.autoencoder", f"--workdir={folder}", "--progress=none", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads((folder / "summary.json").read_text())["metrics"]


def test_a_short_run_writes_its_results(tmp_path):
    metrics = run(tmp_path, "--epochs=1")
    assert {"loss", "code_norm", "val_loss", "val_code_norm"} <= metrics.keys()
    assert (tmp_path / "reconstructions.png").exists()


@pytest.mark.slow
def test_it_keeps_more_of_an_image_than_principal_components_do(tmp_path):
    assert run(tmp_path)["val_loss"] < 0.75 * error_of_components(16)


def error_of_components(count):
    """The squared error of the best linear reconstruction from `count` numbers."""
    train, test = (x.reshape(len(x), -1) for (x, _) in images())
    mean = train.mean(0)
    components = np.linalg.svd(train - mean, full_matrices=False)[2][:count]
    return np.mean(((test - mean) @ components.T @ components + mean - test) ** 2)
