"""Settings of the test run, made before TensorFlow is imported.

This file imports neither TensorFlow nor Keras: the import rule is tested in a second.
"""

import os
import random
import signal
import threading

import hypothesis
import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # GPUs are compared with NumPy's float32, not in TF32

# The first example of a property traces a graph: a deadline would fail it for being first. The same commit meets
# the same examples every time.
hypothesis.settings.register_profile("tfloop", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tfloop")


def pytest_configure(config):
    # What starts the tests in the background may have Ctrl-C ignored, for them and the processes they start.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _the_same_numbers(request):
    """What a test has met it meets again, whichever tests went before it.

    Keras draws the seeds of initializers and layers from Python's numbers.
    """
    random.seed(0)
    np.random.seed(0)
    for value in vars(request.module).values():
        if isinstance(value, np.random.Generator):
            value.bit_generator.state = np.random.default_rng(0).bit_generator.state
