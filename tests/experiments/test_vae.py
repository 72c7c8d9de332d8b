"""The vae experiment: its losses against closed forms, its schedule, and what it reaches."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from experiments.vae.model import VAE
from experiments.vae.picture import grid

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(5, 4, 4, 1)).astype("float32")


def test_losses_are_those_of_the_evidence_lower_bound():
    model = VAE((4, 4, 1), latent=3, units=8)
    logits = np.asarray(model(IMAGES), "float64")
    mean, log_variance = (np.asarray(part, "float64") for part in model.encode(IMAGES))
    p = 1 / (1 + np.exp(-logits))
    reconstruction = -(IMAGES * np.log(p) + (1 - IMAGES) * np.log(1 - p)).sum((1, 2, 3)).mean()
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum(1).mean()
    np.testing.assert_allclose(sorted(model.losses), sorted([reconstruction, kl * 0.0]), rtol=1e-5)
    np.testing.assert_allclose(model.metrics[-1].result(), kl, rtol=1e-4)


def test_weight_of_the_kl_term_rises_to_one():
    model = VAE((4, 4, 1), warmup=10)
    assert [float(model.kl_weight(tf.constant(step, tf.int64))) for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]


def test_parts_add_up_while_the_weight_rises():
    model = VAE((4, 4, 1), units=8, warmup=4)
    model.compile("adam")
    history = model.fit(IMAGES, None, epochs=6, verbose=0).history
    np.testing.assert_allclose(history["loss"], np.add(history["reconstruction"], history["kl"]), rtol=1e-5)
    weights = np.divide(history["kl"], history["kl_unweighted"])
    np.testing.assert_allclose(weights, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-5)


def test_picture_holds_every_decoded_point():
    model = VAE((4, 4, 1), units=8)
    model(IMAGES)
    assert grid(model, 3).shape == (18, 18)


def run(folder, *arguments):
    command = [sys.executable, "-m", "experiments.vae", f"--workdir={folder}", "--progress=none", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads((folder / "summary.json").read_text())["metrics"]


def test_a_short_run_writes_its_results(tmp_path):
    metrics = run(tmp_path, "--epochs=1", "--latent=3")
    assert {"loss", "reconstruction", "kl", "val_loss"} <= metrics.keys()
    assert (tmp_path / "latent_plane.png").exists()


@pytest.mark.slow
def test_test_images_cost_less_than_27_nats(tmp_path):
    assert run(tmp_path)["val_loss"] < 27.0
