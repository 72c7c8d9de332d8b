"""Memory: while a loop runs, blocks that are freed stay with the process, for the steps to come.

glibc gives a large block back to the system when it is freed. XLA asks for its scratch memory anew in every call, so
the system clears it page by page each time: a third of the time that a small transformer's compiled step takes.
"""

import contextlib
import ctypes
import os
import sys
import threading

from tfloop.loop.devices import on_gpu

# Parameters of mallopt(3), and the values for a loop: no block comes from the system alone, and none goes back. The
# last is for the threads' own heaps, of 64 MiB at most, which go back when they are empty but for so many bytes.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 64 * 2**20}
# What glibc begins with, and the thresholds that it comes to by itself as a program frees large blocks.
USUAL = {MMAP_MAX: 65_536, TRIM_THRESHOLD: 64 * 2**20, TOP_PAD: 128 * 2**10, MMAP_THRESHOLD: 32 * 2**20}
# Whoever sets one of these has chosen.
VARIABLES = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)

_lock = threading.Lock()
_running = 0  # loops


@contextlib.contextmanager
def kept():
    """Freed memory is kept while this is open, in one thread or several. Does nothing where `allocator` has none."""
    global _running
    libc = allocator()
    if libc is None:
        yield
        return
    with _lock:
        _running += 1
        set_options(libc, KEEP)
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                set_options(libc, USUAL)


def set_options(libc, options):
    for parameter, value in options.items():
        libc.mallopt(parameter, value)


def give_back():
    """Gives what is free now back to the system: what compiling took, steps do not need."""
    libc = allocator()
    if libc is not None:
        libc.malloc_trim(0)


def allocator():
    """The C library; `None` on a GPU, if it is not glibc, and where the environment says how glibc is to allocate."""
    if sys.platform != "linux" or on_gpu() or any(name in os.environ for name in VARIABLES):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
