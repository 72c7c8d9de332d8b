"""Freed memory stays with the process while a loop runs, and only then: told by glibc's own count of its blocks."""

import ctypes
import os
import pathlib
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest

import tfloop
from tfloop.loop import memory

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

pytestmark = pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="needs glibc 2.33 or later")


class Mallinfo(ctypes.Structure):
    """What mallinfo2(3) returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def is_kept():
    """Whether the memory of a large array, more than is free now, would stay with the process when it is freed."""
    mallinfo = LIBC.mallinfo2
    mallinfo.restype = Mallinfo
    before = mallinfo()
    array = np.empty(before.fordblks + 100 * 2**20, np.uint8)
    mapped = mallinfo().hblkhd - before.hblkhd  # bytes
    assert mapped == 0 or mapped >= array.nbytes
    return mapped == 0


@pytest.fixture(autouse=True)
def on_a_cpu_where_nobody_chose(monkeypatch):
    monkeypatch.setattr(memory, "on_gpu", lambda: False)
    for name in memory.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def model(**settings):
    made = tfloop.Model(inputs=(x := keras.Input((3,))), outputs=keras.layers.Dense(1)(x))
    made.compile("sgd", "mse", **settings)
    return made


class Look(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(is_kept())

    def on_test_end(self, logs=None):
        self.seen.append(is_kept())


@pytest.mark.parametrize("jit_compile", ["auto", "loop"])
def test_only_while_a_loop_runs(jit_compile):
    x, y = np.zeros((8, 3), "float32"), np.zeros((8, 1), "float32")
    made, look = model(jit_compile=jit_compile), Look()
    assert not is_kept()
    made.fit(x, y, epochs=2, verbose=0, validation_data=(x, y), callbacks=[look])
    assert look.seen == [True] * 4 and not is_kept()
    made.evaluate(x, y, verbose=0, callbacks=[look])
    assert look.seen == [True] * 5 and not is_kept()


def test_a_fit_that_fails_leaves_it_as_it_was():
    def fail(epoch, logs):
        raise RuntimeError("enough")

    failing = keras.callbacks.LambdaCallback(on_epoch_end=fail)
    with pytest.raises(RuntimeError, match="enough"):
        model().fit(np.zeros((8, 3)), np.zeros((8, 1)), verbose=0, callbacks=[failing])
    assert not is_kept()


def test_the_last_of_several_ends_it():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with memory.kept():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with memory.kept():
        thread.start()
        assert inside.wait(60)
        with memory.kept():
            pass
        assert is_kept()
    assert is_kept()
    leave.set()
    thread.join()
    assert not is_kept()


@pytest.mark.parametrize("name", memory.VARIABLES)
def test_who_chose_is_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "")
    with memory.kept():
        assert not is_kept()
    assert memory.allocator() is None  # nor is anything given back


def test_nothing_is_kept_for_steps_on_a_gpu(monkeypatch):
    monkeypatch.setattr(memory, "on_gpu", lambda: True)
    with memory.kept():
        assert not is_kept()
    assert memory.allocator() is None


def resident():
    """Bytes of this process in the machine's memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_free_can_be_given_back():
    before = resident()
    with memory.kept():
        arrays = [np.ones(2**20) for _ in range(40)]
        del arrays
        kept = resident()
        memory.give_back()
        assert kept - before > 250e6 and resident() - before < 50e6


FAULTS = """
import resource
import keras, numpy as np, tfloop

class Faults(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

inputs = keras.Input((512,))
x = inputs
for _ in range(12):
    x = keras.layers.Dense(512, activation="tanh")(x)
model = tfloop.Model(inputs, x)
model.compile("adam", "mse", jit_compile="step")
faults = Faults()
faults.ends = []
data = np.zeros((10 * 512, 512), "float32")
model.fit(data, data, batch_size=512, epochs=4, verbose=0, callbacks=[faults])
print(int(np.median(np.diff(faults.ends))) // 10)
"""


def test_a_compiled_step_finds_its_memory_again():
    """Each layer's activations have 1 MiB, 256 pages, as have its weights, and their gradient and moments."""

    def faults(**environment):
        command = [sys.executable, "-c", FAULTS]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"} | environment
        ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(ran.stdout)

    usual = faults(MALLOC_MMAP_MAX_="65536")
    if usual < 512:
        pytest.skip(f"the system gives memory in large pages: {usual} faults a step")
    assert faults() < usual / 20
