"""The lipschitz experiment: its measures against NumPy, and what tells the four versions apart."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest

from experiments.lipschitz import measure
from experiments.lipschitz.model import LAYERS, VERSIONS, build, slope_of_pairs

RNG = np.random.default_rng(0)


def test_slope_of_a_linear_map_is_its_sigma():
    w = RNG.normal(size=(12, 5)).astype("float32")
    model = keras.Sequential([keras.Input((3, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(5)])
    model.layers[-1].set_weights([w, np.zeros(5)])
    x = RNG.normal(size=(20, 3, 4, 1)).astype("float32")
    sigma = np.linalg.svd(w, compute_uv=False)[0]
    np.testing.assert_allclose(measure.slope(model, x), sigma, rtol=1e-5)
    assert 0.3 * sigma < slope_of_pairs(x, model(x)) <= sigma * 1.0001


@pytest.mark.parametrize("version", VERSIONS)
def test_only_tfloop_gives_the_optimizer_another_gradient_than_the_raw_one(version):
    keras.utils.set_random_seed(1)  # of one network in five a gradient has next to nothing along u v'
    rng = np.random.default_rng(1)
    model = build(version, units=16, iterations=50)
    before = model.get_weights()
    x, y = rng.uniform(size=(32, 8, 8, 1)).astype("float32"), rng.integers(0, 10, 32)
    cosines = measure.gradient_cosines(model, x, y)
    assert set(cosines) == set(LAYERS)
    for to_raw, to_kernel in cosines.values():
        if version == "tfloop":
            assert to_raw < 0.9999 and abs(to_kernel) < 1e-5
        else:
            np.testing.assert_allclose(to_raw, 1.0, rtol=1e-5)
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize(("version", "first", "second"), [("plain", 2, 2), ("constraint", 2, 1), ("tfloop", 1, 1)])
def test_logged_sigma_is_of_the_kernel_that_the_step_used(version, first, second):
    keras.utils.set_random_seed(0)
    model = build(version)
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = np.zeros((8, 8, 8, 1), "float32"), np.zeros(8, "int32")
    sigmas = [model.train_on_batch(x, y, return_dict=True)["sigma_hidden_1"] for _ in range(2)]
    np.testing.assert_allclose(sigmas, [first, second], rtol=0.05)


def run(folder, *arguments):
    command = [sys.executable, "-m", "experiments.lipschitz", f"--workdir={folder}", "--progress=none", *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "worst gradient along kernel" in found.stdout
    return json.loads((folder / "summary.json").read_text())["metrics"]


def test_a_short_run_writes_its_results(tmp_path):
    assert set(run(tmp_path, "--epochs=1", "--units=8", "--batch_size=480")) == set(VERSIONS)
    assert (tmp_path / "lipschitz.png").exists()
    assert all((tmp_path / version / "summary.json").exists() for version in VERSIONS)


@pytest.mark.slow
def test_only_before_use_the_network_is_bounded_in_every_step_and_learns(tmp_path):
    metrics = run(tmp_path)
    plain, constraint, keras_, tfloop = (metrics[version] for version in VERSIONS)
    in_training = "worst_sigma_in_training"
    assert plain[in_training] > 2.5 and plain["slope"] > 5
    assert constraint[in_training] == constraint["sigma_in_first_step"] > 1.8
    assert abs(keras_["worst_sigma_in_inference"] - 1) > 0.04
    assert abs(tfloop[in_training] - 1) < 0.08 and abs(tfloop["worst_sigma_in_inference"] - 1) < 0.08
    assert tfloop["slope"] < 1.1
    for other in (plain, constraint, keras_):
        assert other["least_cosine_to_raw_gradient"] > 0.9999 and other["worst_gradient_along_kernel"] > 0.1
    assert tfloop["least_cosine_to_raw_gradient"] < 0.9 and tfloop["worst_gradient_along_kernel"] < 1e-4
    assert constraint["least_stable_rank"] < 2 < tfloop["least_stable_rank"]
    assert tfloop["val_accuracy"] > 0.8 > 0.5 > max(constraint["val_accuracy"], keras_["val_accuracy"])
