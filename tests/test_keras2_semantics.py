"""What code written for Keras 2's `add_metric` and `add_loss` may rely on.

The programs of `keras2_scenarios.py` run here on tfloop, and in one subprocess on Keras 2 itself: the results must
agree. What follows cannot be compared, or differs from Keras 2 on purpose, and says so.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import subprocess
import sys

import keras2_scenarios as scenarios
import pytest


@pytest.fixture(scope="session")
def keras2(tmp_path_factory):
    """What every scenario saw under Keras 2. Parallel test processes share one run of it."""
    folder = tmp_path_factory.getbasetemp()
    results = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "keras2.json"
    with locked(results.with_suffix(".lock")):
        if not results.exists():
            script = pathlib.Path(__file__).with_name("keras2_scenarios.py")
            found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
            results.write_text(found.stdout)
    return json.loads(results.read_text())


@contextlib.contextmanager
def locked(path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_as_in_keras_2(name, keras2):
    expected = keras2[name]
    assert not str(expected).startswith("failed"), expected
    assert_agrees(plain(scenarios.SCENARIOS[name](scenarios.keras3())), expected)


def plain(value):
    return json.loads(json.dumps(value, default=float))


def assert_agrees(ours, theirs):
    """Equal, numbers to 1e-6. Logs have the same names in the same order; ours may also show the parts of the loss."""
    assert type(ours) is type(theirs) or {type(ours), type(theirs)} <= {int, float}, (ours, theirs)
    if isinstance(theirs, dict):
        assert [n for n in ours if n in theirs or not is_part_of_loss(n)] == list(theirs)
        for name, value in theirs.items():
            assert_agrees(ours[name], value)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), (ours, theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_agrees(one, other)
    elif isinstance(theirs, float) and not isinstance(theirs, bool):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6, nan_ok=True)
    else:
        assert ours == theirs


def is_part_of_loss(name):
    return name.removeprefix("val_") in ("compiled_loss", "other_losses")
