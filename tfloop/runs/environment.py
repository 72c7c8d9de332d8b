"""What the bits of a run depend on besides its flags: what is said in code, versions, threads, machine."""

import os
import platform

import keras
import numpy as np
import tensorflow as tf

from tfloop import _keras, reproducibility
from tfloop.runs.config import described


def training(model, arguments):
    """`entry -> description` of what the code gives to `compile` and `fit` and changes the numbers.

    An optimizer that has made updates is left out: callbacks may have changed it since.
    """
    compiled = _keras.compile_arguments(model)
    found = {name: described(compiled.get(name)) for name in ("loss", "loss_weights")}
    found["accumulate"] = model._tfloop_choices["accumulate"]
    for name, default in (("class_weight", None), ("sample_weight", None), ("validation_freq", 1)):
        found[name] = described(arguments.get(name, default))
    unused = [(path, o) for path, o in reproducibility.optimizers(model) if not int(o.iterations.numpy())]
    return found | {path: described(optimizer) for path, optimizer in unused}


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
