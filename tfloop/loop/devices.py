"""What steps run on, and how much fits there."""

import os

import tensorflow as tf

SHARE = 0.25  # of the machine's memory
ON_GPU = 2 * 2**30  # bytes: a GPU does not say how much memory it has


def on_gpu():
    """Whether steps run on a GPU."""
    return bool(tf.config.list_logical_devices("GPU"))


def host_bytes():
    """How many bytes may be kept in the machine's memory."""
    return SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_bytes():
    """How many bytes of arrays may stay where the steps run."""
    return min(host_bytes(), ON_GPU) if on_gpu() else host_bytes()
