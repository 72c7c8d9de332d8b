"""A process that saves checkpoints and dies where it is told to. It needs no TensorFlow.

python saver.py FOLDER POINT STEPS      killed by SIGKILL at POINT of the last save
python saver.py FOLDER limit STEPS      no file may be larger than 64 KiB from the last save on
python saver.py FOLDER none STEPS       saves, and prints how often fsync was called
"""

import os
import resource
import signal
import sys
import types
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]


def without_tensorflow():
    """Makes `tfloop.runs` importable without `tfloop/__init__.py`, which needs seconds."""
    package = types.ModuleType("tfloop")
    package.__path__ = [str(REPOSITORY / "tfloop")]
    sys.modules["tfloop"] = package


def state(step):
    """A state of some 100 KB that tells its step by every element."""
    return {"w": np.full((100, 250), step, "f"), "n": np.array(step), "empty": np.zeros((0, 3))}


def main(folder, point, steps):
    without_tensorflow()
    from tfloop.runs.checkpoint import Checkpoints

    steps = [int(step) for step in steps.split(",")]
    synced, fsync = [], os.fsync

    def counted(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = counted

    def at(here):
        if here == point and checkpoints.current == steps[-1]:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = Checkpoints(folder, keep=2, at=at, sleep=lambda seconds: None)
    for step in steps:
        checkpoints.current = step
        if point == "limit" and step == steps[-1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
        checkpoints.save(step, state(step), {"epoch": step})
        try:
            checkpoints.wait()
        except Exception as error:
            print(type(error).__name__, error)
    assert "tensorflow" not in sys.modules
    print("\n".join(synced))


if __name__ == "__main__":
    main(*sys.argv[1:])
