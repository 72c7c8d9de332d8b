"""The sngan experiment: its distance against NumPy, its step, and how near it comes to the real digits."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.sngan import frechet
from experiments.sngan.model import SNGAN

RNG = np.random.default_rng(0)


def test_distance_is_that_of_its_formula():
    a, b = RNG.normal(size=(200, 4)), RNG.normal(1.0, 2.0, size=(300, 4))
    root_a = symmetric_root(np.cov(a, rowvar=False))
    root = symmetric_root(root_a @ np.cov(b, rowvar=False) @ root_a)
    spread = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + spread
    np.testing.assert_allclose(frechet.distance(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(frechet.distance(a, a), 0.0, atol=1e-6)


def symmetric_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def test_one_step_trains_both_nets_and_every_kernel_of_both_is_normalised():
    gan = SNGAN(width=2, noise=4)
    gan.compile()
    variables = [*gan.generator.trainable_variables, *gan.discriminator.trainable_variables]
    kernels = [v for v in variables if v.name == "kernel"]
    assert len(gan.effective_weights()) == len(kernels) == 8
    assert gan.samples(3).shape == (3, 8, 8, 1)

    before = [kernel.numpy() for kernel in kernels]
    x = RNG.uniform(size=(8, 8, 8, 1)).astype("float32")
    logs = gan.fit(x, None, batch_size=8, verbose=0).history
    assert set(logs) == {"discriminator_loss", "generator_loss", "real", "fake"}
    assert not [k.path for k, was in zip(kernels, before, strict=True) if np.array_equal(k, was)]


def run(folder, *arguments):
    command = [sys.executable, "-m", "experiments.sngan", f"--workdir={folder}", "--progress=none", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads((folder / "summary.json").read_text())["metrics"]


def test_a_short_run_writes_its_results(tmp_path):
    metrics = run(tmp_path, "--epochs=1", "--features_epochs=1", "--width=1", "--batch_size=512")
    assert {"frechet_generated", "frechet_noise"} <= metrics.keys()
    assert (tmp_path / "samples.png").exists()
    assert all((tmp_path / name / "summary.json").exists() for name in ("features", "gan"))


@pytest.mark.slow
def test_samples_come_nearer_to_the_digits_than_noise(tmp_path):
    metrics = run(tmp_path, "--epochs=40")
    assert metrics["frechet_generated"] < metrics["frechet_noise"] / 2
    assert metrics["frechet_generated"] > metrics["frechet_held_out"] / 2
