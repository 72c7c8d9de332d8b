"""Rivals: for each a function that trains some epochs and says how long one step took."""

import time

import keras
import numpy as np

import tfloop
from experiments.benchmark import hand_written

KERAS_SETTINGS = [
    {"steps_per_execution": steps, "jit_compile": jit} for steps in (1, 32) for jit in (False, True)
]  # besides what compile() chooses by itself
LEAST = 0.15  # seconds of one measurement


class Epochs(keras.callbacks.Callback):
    """The times at which epochs end; ends the fit after `count` of them."""

    def __init__(self, count):
        super().__init__()
        self.count, self.ends = count, []

    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(time.perf_counter())
        if len(self.ends) >= self.count:
            self.model.stop_training = True


class Fit:
    """`fit` of a model. The first epoch of each call is left out: it holds what is done once a call."""

    def __init__(self, workload, data, base, **settings):
        self.workload, self.data = workload, data
        self.model = workload.build(base)
        self.model.compile(**workload.compiled(), **settings)

    def seconds(self, epochs):
        """Seconds a step, over that many epochs."""
        timer = Epochs(epochs + 1)
        # As many epochs as a training has: tfloop's choice of an engine depends on how long the run will be.
        self.model.fit(**self.workload.feed(self.data), epochs=1000, verbose=0, callbacks=[timer])
        return (timer.ends[-1] - timer.ends[0]) / epochs / self.workload.steps(self.data)


class Hand:
    """A hand-written epoch."""

    def __init__(self, workload, data, make):
        self.workload, self.data = workload, data
        self._epoch = make(workload.build(keras.Model), workload, data)

    def seconds(self, epochs):
        started = time.perf_counter()
        for _ in range(epochs):
            self._epoch()
        return (time.perf_counter() - started) / epochs / self.workload.steps(self.data)


def rivals(workload, data):
    """`name -> (rival, which)`. Of several settings of one kind only the fastest is kept, and `which` says it."""
    found: dict[str, tuple] = {"keras": (Fit(workload, data, keras.Model), "")}
    settings = {describe(s): lambda s=s: Fit(workload, data, keras.Model, **s) for s in KERAS_SETTINGS}
    found["keras, best"] = fastest(settings)
    found["step by hand"] = (Hand(workload, data, hand_written.per_batch), "")
    loops = {name: lambda name=name: Hand(workload, data, hand_written.LOOPS[name]) for name in workload.loops}
    found["loop by hand"] = fastest(loops)
    made = Fit(workload, data, tfloop.Model)
    made.seconds(1)
    found["tfloop"] = (made, made.model.engine)
    return found


def describe(settings):
    return f"{settings['steps_per_execution']} steps{', XLA' if settings['jit_compile'] else ''}"


def fastest(makers):
    """Makes each, measures it shortly, and returns the fastest with its name."""
    measured = {}
    for name, make in makers.items():
        keras.utils.set_random_seed(0)
        rival = make()
        rival.seconds(1)
        measured[name] = (min(rival.seconds(1) for _ in range(2)), rival)
    best = min(measured, key=lambda name: measured[name][0])
    return measured[best][1], best


def interleaved(found, rounds):
    """`name -> seconds a step` of each rival in turns, so that what else the machine does meets all alike.

    Returns the medians.
    """
    epochs = {}
    for name, (rival, _) in found.items():
        rival.seconds(1)
        epoch = rival.seconds(1) * rival.workload.steps(rival.data)
        epochs[name] = max(1, int(np.ceil(LEAST / epoch)))
    times = {name: [] for name in found}
    for _ in range(rounds):
        for name, (rival, _) in found.items():
            times[name].append(rival.seconds(epochs[name]))
    return {name: float(np.median(values)) for name, values in times.items()}
