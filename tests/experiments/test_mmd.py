"""The mmd experiment: its distance against NumPy, its domains, its model, and what it shows."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest

import tfloop
from experiments.mmd.data import domains
from experiments.mmd.model import build, mmd2

RNG = np.random.default_rng(0)


def mmd2_by_hand(a, b):
    squares = lambda p, q: ((p[:, None] - q[None]) ** 2).sum(-1)
    width = squares(a, b).mean()
    kernel = lambda p, q: sum(np.exp(-squares(p, q) / (s * width)).mean() for s in (0.25, 0.5, 1.0, 2.0, 4.0))
    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


def test_distance_is_that_of_its_formula():
    a, b = RNG.normal(size=(20, 5)), RNG.normal(1.0, 2.0, size=(30, 5))
    np.testing.assert_allclose(mmd2(a.astype("float32"), b.astype("float32")), mmd2_by_hand(a, b), rtol=1e-4)
    np.testing.assert_allclose(mmd2(a.astype("float32"), a.astype("float32")), 0.0, atol=1e-6)


def test_domains_share_no_image_and_their_light_is_the_same():
    (source, labels), (target, target_labels), (test, _) = domains()
    assert len(source) == len(labels) == len(target) == len(target_labels)
    dark = target - np.linspace(0.0, 0.8, 8)[:, None]
    seen = {image.round(1).tobytes() for image in 0.6 * source}
    assert not seen & {image.round(1).tobytes() for image in dark}
    np.testing.assert_allclose(target.mean((0, 1)), test.mean((0, 1)), atol=0.05)


def test_prediction_model_needs_no_labels_and_shares_the_weights():
    model = build((8, 8, 1))
    prediction = tfloop.without_inputs(model, ["source", "labels"])
    images = RNG.normal(size=(4, 8, 8, 1)).astype("float32")
    inputs = {"source": images[::-1], "labels": np.arange(4), "target": images}
    np.testing.assert_array_equal(prediction({"target": images})["logits"], model(inputs)["logits"])


def run(folder, *arguments):
    command = [sys.executable, "-m", "experiments.mmd", f"--workdir={folder}", "--progress=none", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads((folder / "summary.json").read_text())["metrics"]


def test_a_short_run_writes_its_results(tmp_path):
    run(tmp_path, "--epochs=1")
    assert (tmp_path / "features.png").exists()
    rows = (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()
    assert {"loss", "classification", "alignment", "mmd"} <= json.loads(rows[-1]).keys()


@pytest.mark.slow
def test_target_accuracy_rises_with_the_loss(tmp_path):
    metrics = run(tmp_path)
    assert metrics["target_accuracy_with"] > 0.9
    assert metrics["target_accuracy_with"] > metrics["target_accuracy_without"] + 0.1
    mmd = [json.loads((tmp_path / n / "summary.json").read_text())["metrics"]["mmd"] for n in ("without", "with")]
    assert mmd[1] < mmd[0] / 4


def test_features_are_float32_in_mixed_precision():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert all(output.dtype == "float32" for output in build((8, 8, 1)).outputs)
    finally:
        keras.config.set_dtype_policy(policy)
