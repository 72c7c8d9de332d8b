"""What is measured besides the time of a step: watched scalars, cold starts, imports, memory, growth."""

import json
import subprocess
import sys

import keras
import numpy as np
from keras import layers, ops

import tfloop
from experiments.benchmark import workloads
from experiments.benchmark.rivals import Fit, interleaved

COLD = ("small_mlp", "convolutions", "transformer", "gan", "tf_data")


def watched(rounds):
    """Seconds a step with 0, 10 and 100 watched scalars, and with the root mean square of every output."""
    found = {}
    small = workloads.WORKLOADS["small_mlp"]
    data = small.data()
    for count in (0, 10, 100):
        keras.backend.clear_session()  # so that the layer is called `dense`
        rival = Fit(small, data, tfloop.Model)
        for i in range(count):
            rival.model.add_metric(lambda t, i=i: ops.mean(t["dense"][:, i]), name=f"unit_{i}")
        found[f"small_mlp, {count} scalars"] = rival
    large = workloads.WORKLOADS["transformer"]
    data = large.data()
    for name in ("transformer", "transformer, every output's rms"):
        rival = Fit(large, data, tfloop.Model)
        if "rms" in name:
            rival.model.watch("*", "rms")
        found[name] = rival
    return interleaved({name: (rival, "") for name, rival in found.items()}, rounds)


def cold(what, base, *arguments, times=3):
    """The median of what `experiments.benchmark.cold` prints in processes of their own."""
    command = [sys.executable, "-m", "experiments.benchmark.cold", what, base, *arguments]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(times)]
    values = [json.loads(text.strip().splitlines()[-1]) for text in printed]
    return {k: float(np.median([v[k] for v in values])) for k in values[0] if not isinstance(values[0][k], str)}


def starts():
    """Seconds of a run of one epoch in a new process, and of the imports."""
    found = {}
    for name in COLD:
        for base in ("keras", "tfloop"):
            found[f"one epoch of {name}, {base}"] = cold("epoch", base, name)["seconds"]
    imports = cold("import", "tfloop")
    return {**found, "import keras": imports["keras"], "import tfloop, after that": imports["tfloop"]}


def memory():
    """Peak memory in megabytes of training on 400 MB of arrays."""
    return {base: cold("memory", base, times=1)["megabytes"] for base in ("keras", "tfloop")}


def growth(rounds):
    """Yields seconds a step of Keras' `fit` and of tfloop, as batch, depth and data set grow."""
    cases = {}
    for batch in (32, 128, 512):
        cases[f"batch {batch}"] = case(batch, 1, 12_800)
    for depth in (1, 4, 16):
        cases[f"{depth} hidden layers"] = case(128, depth, 12_800)
    for examples in (1280, 12_800, 128_000):
        cases[f"{examples} examples"] = case(128, 1, examples)
    for name, workload in cases.items():
        data = workload.data()
        pair = {base: (Fit(workload, data, of), "") for base, of in (("keras", keras.Model), ("tfloop", tfloop.Model))}
        yield name, interleaved(pair, rounds)


def case(batch_size, depth, examples):
    def made():
        return [*(layers.Dense(100, activation="relu") for _ in range(depth)), layers.Dense(10)]

    return workloads.Workload(
        "growth",
        workloads.functional(made, (64,)),
        workloads.vectors(examples, 64),
        batch_size,
        workloads.adam_crossentropy,
        1.0,
    )
