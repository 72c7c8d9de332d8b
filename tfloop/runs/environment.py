"""What the bits of a run depend on besides its flags: versions, threads, machine."""

import os
import platform

import keras
import numpy as np
import tensorflow as tf


def describe():
    """`versions`, `threads` and `machine`, as `config.json` records them."""
    return {
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
        "threads": {
            "intra_op": tf.config.threading.get_intra_op_parallelism_threads(),  # 0: as many as there are cpus
            "inter_op": tf.config.threading.get_inter_op_parallelism_threads(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "machine": {
            "cpu": _cpu(),
            "devices": [device.device_type for device in tf.config.list_physical_devices()],
            "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
        },
    }


def _cpu():
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
