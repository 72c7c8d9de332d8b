"""Two replicas make the updates, and show the numbers, of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent

# What is equal to 1e-6 on one device and on two replicas.
EQUAL = {
    "the loop": "terms dataset dataset_of_unknown_size generator sample_weights accumulated single_batches skipped "
    "one_replica averages",
    "own steps": "KerasStyle Naive Careful Careful_uneven Constant Constant_uneven Minimized two_optimizers eagerly "
    "weight_average",
    "layers and optimizers": "clipped_globally optimizer_average optimizer_accumulates embedding "
    "synchronized_batch_norm spectral_norm",
    "sums that cross replicas": "synchronized_batch_norm_of_uneven_parts added_losses_around_a_synchronization masked "
    "summed mean_of_weights ignored_class",
}


def ran(names):
    """What the scenarios measured in a process of their own: `{name: {"one": ..., "two": ...}}`."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "scenarios.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def leaves(path, value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(f"{path}/{key}", item)
    else:
        yield path, np.asarray(value)


def differences(one, two, tolerance):
    one, two = dict(leaves("", one)), dict(leaves("", two))
    assert set(one) == set(two)
    return {n: (one[n], two[n]) for n in one if not np.allclose(one[n], two[n], rtol=tolerance, atol=tolerance)}


@pytest.mark.parametrize("kind", EQUAL)
def test_as_on_one_device(kind):
    for name, found in ran(EQUAL[kind].split()).items():
        assert not differences(found["one"], found["two"], 1e-6), name


@pytest.fixture(scope="module")
def others():
    return ran(["mixed_float16", "batch_norm", "random_numbers", "random_numbers_eagerly", "refusals"])


def test_a_loss_scale_skips_on_all_replicas_or_on_none(others):
    found = others["mixed_float16"]
    assert not differences(found["one"], found["two"], 1e-3)


def test_statistics_of_each_replica_are_averaged_and_equal_on_all(others):
    found = others["batch_norm"]["two"]
    halves = np.array(found["inputs"]).reshape(2, 7, 3)
    for name, expected in (("mean", halves.mean(1).mean(0)), ("variance", halves.var(1).mean(0))):
        start = 0.0 if name == "mean" else 1.0
        copies = np.array(found[name])
        np.testing.assert_array_equal(copies[0], copies[1])
        np.testing.assert_allclose(copies[0], 0.9 * start + 0.1 * expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["random_numbers", "random_numbers_eagerly"])
def test_random_numbers_differ_between_replicas(others, name):
    one, two = others[name]["one"]["history"], others[name]["two"]["history"]
    for drawn in ("noise", "free"):
        assert one[f"{drawn}_max"] == one[f"{drawn}_min"]
        assert all(np.subtract(two[f"{drawn}_max"], two[f"{drawn}_min"]) > 0.01)
    assert any(np.subtract(two["dropout_max"], two["dropout_min"]) > 1)


def test_random_numbers_are_those_of_an_eager_step(others):
    one, two = (others[name]["two"] for name in ("random_numbers", "random_numbers_eagerly"))
    assert not differences(one, two, 1e-5)


@pytest.mark.parametrize(
    ("what", "message"),
    {
        "model": "'hidden/kernel' was made outside the scope of the MirroredStrategy",
        "optimizer": "The optimizer 'adam' was made outside the scope",
        "strategy": "CentralStorageStrategy is not supported",
        "keras": "keras.distribution does nothing with the TensorFlow backend",
        "jit": "XLA cannot compile the step: a distribution strategy runs it on replicas",
    }.items(),
)
def test_what_cannot_be_is_refused(others, what, message):
    assert message in others["refusals"]["two"][what]
