"""python -m experiments.benchmark.cold WHAT BASE [WORKLOAD]: one measurement in a process of its own, as JSON.

WHAT: `import` (seconds to import), `epoch` (seconds of a run of one epoch, everything included), `memory` (peak,
of training on 400 MB of arrays). BASE: `keras` or `tfloop`.
"""

import json
import sys
import time
from typing import Any


def imported(base):
    started = time.perf_counter()
    import keras  # noqa: F401

    between = time.perf_counter()
    if base == "tfloop":
        import tfloop  # noqa: F401
    return {"keras": between - started, "tfloop": time.perf_counter() - between}


def epoch(base, name):
    import keras

    import tfloop
    from experiments.benchmark.workloads import WORKLOADS

    workload = WORKLOADS[name]
    data = workload.data()

    started = time.perf_counter()
    model = workload.build(tfloop.Model if base == "tfloop" else keras.Model)
    model.compile(**workload.compiled())
    model.fit(**workload.feed(data), epochs=1, verbose=0)
    return {"seconds": time.perf_counter() - started}


def memory(base):
    import keras
    import numpy as np
    from keras import layers

    import tfloop

    examples = 128_000
    x = np.random.default_rng(0).random((examples, 784), "float32")
    y = np.zeros(examples, "int32")
    inputs = keras.Input((784,))
    model = (tfloop.Model if base == "tfloop" else keras.Model)(inputs, layers.Dense(10)(layers.Dense(100)(inputs)))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, batch_size=128, epochs=100, verbose=0, callbacks=[stopping_after(3)])
    return {"megabytes": peak(), "engine": getattr(model, "engine", "")}


def peak():
    """The most memory that this process had, in megabytes. What `getrusage` says begins with that of the parent."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def stopping_after(epochs):
    import keras

    def stop(epoch, logs):
        callback.model.stop_training = epoch + 1 >= epochs

    callback = keras.callbacks.LambdaCallback(on_epoch_end=stop)
    return callback


def main(what, *arguments):
    measure: Any = {"import": imported, "epoch": epoch, "memory": memory}[what]
    print(json.dumps(measure(*arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
