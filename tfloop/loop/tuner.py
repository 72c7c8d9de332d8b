"""Tuner: which engine a fit runs with.

What is asked for explicitly is obeyed. `auto` measures the engines on batches of the data before the first
step, if the run is long enough to pay for that, and sets every variable back to what it was. Where results must
not depend on a clock (deterministic operations), `auto` is `graph`.
"""

import contextlib
import dataclasses
import time

import tensorflow as tf

from tfloop import _keras
from tfloop.loop import memory
from tfloop.loop.devices import host_bytes, on_gpu
from tfloop.loop.feed import flat, nbytes

SHARE = 0.05  # of the expected run, for the trial
MOST = 10.0  # seconds, for the trial
MOST_ON_GPU = 60.0  # there XLA tries several kernels for each product and convolution, and steps gain more
LEAST = 50  # steps: no run shorter than this is worth a trial
MEASURED = 0.02  # seconds, for one measurement of one engine, if a step takes less
ROUNDS = 4  # further measurements of each engine that is still in the race
LOST = 1.4  # times slower than the best, in its best measurement: out of the race
MARGIN = 0.97  # of graph's time, what an engine must undercut to be preferred to it
OVERHEAD = 15e-6  # seconds an operation: a faster graph step is mostly overhead, which a compiled one has not
COMPILING = 2e-3  # seconds an operation, before anything was measured

EXPLICIT = {True: "jit", "step": "jit", "loop": "scan", False: "graph"}

# In the body of an XLA while loop on CPU the gradient convolutions keep a form that is not rewritten into a fast
# one: 398 ms a step were seen against 7 for the same step compiled alone.
CONVOLUTIONS = tuple(f"{op}Backprop" for op in ("Conv2D", "Conv3D", "DepthwiseConv2dNative"))

# Random numbers whose state is in the operation itself, where nothing reads it: those of `tf.random.normal`.
HIDDEN_STATE = frozenset(
    ("RandomUniform", "RandomUniformInt", "RandomStandardNormal", "TruncatedNormal", "ParameterizedTruncatedNormal")
) | frozenset(("RandomShuffle", "RandomGamma", "RandomPoissonV2", "Multinomial"))
# What a trial cannot take back: those, and calls of Python.
UNREPEATABLE = HIDDEN_STATE | {"PyFunc", "EagerPyFunc"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """An engine for training and one for evaluation.

    `seconds`: a step's, for each engine that was measured. `why`: one line to be shown, if there is something to say.
    """

    engine: str
    evaluation: str
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    why: str = ""

    def as_dict(self):
        """Plain data for JSON, from which `given` makes the choice again."""
        return {"engine": self.engine, "evaluation": self.evaluation, "seconds": dict(self.seconds)}


GRAPH = Choice("graph", "graph")


def given(choice):
    """The choice that an earlier run made: what `Choice.as_dict` gave, or the name of an engine."""
    if isinstance(choice, str):
        choice = {"engine": choice}
    return Choice(choice["engine"], choice.get("evaluation", choice["engine"]), choice.get("seconds", {}))


class Tuner:
    """Chooses engines for a `Runner`, and remembers what it found.

    Args:
        runner: the `Runner` whose programs are tried.
        clock: a function that returns seconds.
    """

    def __init__(self, runner, clock=time.perf_counter):
        self._runner = runner
        self._clock = clock
        self._found = {}  # (program, capacity) -> Choice

    def choose(self, source, steps, tests, capacity):
        """The choice for a fit.

        Args:
            source: the data.
            steps: how many training steps the run is expected to have, `None` where that is not known.
            tests: how many steps of evaluation it is expected to have.
            capacity: the most steps that a chunk may have.
        """
        program = self._runner.program("train", source.spec)
        if (program, capacity) in self._found:
            return self._found[program, capacity]
        notes = uncompilable(program)
        if notes:
            return dataclasses.replace(GRAPH, why=f"The step runs as a graph, XLA cannot compile it: {notes}.")
        if steps is None or steps < LEAST or _keras.are_operations_deterministic() or not may_try(program):
            return GRAPH
        trial = Trial(self._runner, program, source, steps, capacity, self._clock)
        choice = trial.choice(tests)
        memory.give_back()
        if len(choice.seconds) > 1:
            self._found[program, capacity] = dataclasses.replace(choice, why="")
        return choice


class Trial:
    """Engines measured on the same batches, in turns: a graph, and what the run is long enough to try beside it."""

    def __init__(self, runner, program, source, steps, capacity, clock):
        self._runner, self._program, self._steps, self._clock = runner, program, steps, clock
        self._began = clock()
        self._source, self._capacity = source, capacity
        self._most = MOST_ON_GPU if on_gpu() else MOST
        self._feeds = {}
        self._times = {}  # engine -> seconds a step, of each measurement
        self._compiling = {}  # engine -> seconds
        self._dropped = {}  # engine -> reason

    def choice(self, tests):
        with unchanged(self._program.variables):
            self._try("graph")
            self._graph = self._spent()  # a run without a trial has nearly all of this too
            for engine in rivals(self._program.operations, self._is_overhead()):
                if self._pays(engine):
                    self._try(engine)
            self._repeat()
        return self._best(tests)

    def _try(self, engine):
        """Compiles an engine and measures it shortly. What cannot compile is left out, with the reason."""
        started = self._clock()
        try:
            self._run(engine, 1)
        except (tf.errors.OpError, ValueError, TypeError, NotImplementedError) as error:
            if engine == "graph":
                raise
            self._dropped[engine] = str(error).strip().partition("\n")[0][:200]
            return
        self._compiling[engine] = self._clock() - started
        self._times[engine] = [self._run(engine, 1)]
        if engine == "graph" and self._is_over_soon():
            return
        for again in range(5):  # of few steps the chunk is most, and what looks lost may have been disturbed
            if again < 2 or self._is_lost(engine):
                self._measure(engine)

    def _measure(self, engine):
        """Runs as many steps as the time for a measurement allows, or one."""
        seconds = min(self._times[engine])
        self._times[engine].append(self._run(engine, max(1, int(MEASURED / max(seconds, 1e-6)))))

    def _is_lost(self, engine):
        return min(self._times[engine]) > LOST * min(map(min, self._times.values()))

    def _run(self, engine, count):
        """Seconds a step."""
        blocks = self._runner.takes_blocks(engine, "train")
        if blocks not in self._feeds:
            self._feeds[blocks] = self._source.sample(self._capacity, self._capacity, blocks)
        feed = self._feeds[blocks]
        count = min(count, feed.count)
        started = self._clock()
        self._runner.run(engine, "train", dataclasses.replace(feed, count=count), 0)
        return (self._clock() - started) / count

    def _is_over_soon(self):
        """Whether the run takes hardly longer than a compilation, as far as one step can tell."""
        return 2 * COMPILING * len(self._program.operations) > self._steps * self._times["graph"][0]

    def _is_overhead(self):
        return min(self._times["graph"]) < OVERHEAD * len(self._program.operations)

    def _pays(self, engine):
        """Whether the run is long enough for compiling and measuring an engine."""
        rivals = [s for e, s in self._compiling.items() if e != "graph"]
        cost = max(rivals or [2 * self._graph, COMPILING * len(self._program.operations)])
        expected = self._steps * min(map(min, self._times.values()))
        if self._spent() + cost > self._most:
            return False
        if not rivals and self._is_overhead() and cost < expected / 4:
            return True  # the engine itself will save more
        return self._spent() - self._graph + cost < SHARE * expected

    def _spent(self):
        return self._clock() - self._began

    def _repeat(self):
        """Measures those that are still in the race in turns, so that what else the machine does meets all alike."""
        for _ in range(ROUNDS):
            racing = [e for e in self._times if not self._is_lost(e)]
            if len(racing) < 2 or self._spent() > self._most:
                return
            for engine in racing:
                self._measure(engine)

    def _best(self, tests):
        seconds = {e: min(s) for e, s in self._times.items()}
        engine = min(seconds, key=seconds.get)
        if seconds[engine] > MARGIN * seconds["graph"]:
            engine = "graph"
        # An evaluation step is about a third of a training step, to compile and to run.
        saved = tests * (seconds["graph"] - seconds[engine])
        evaluation = engine if saved > self._compiling[engine] else "graph"
        return Choice(engine, evaluation, seconds, self._line(engine, seconds))

    def _line(self, engine, seconds):
        others = [f"{e} {1e3 * s:.3g}" for e, s in seconds.items() if e != engine]
        told = [f"Engine {engine}: {1e3 * seconds[engine]:.3g} ms a step ({', '.join(others)})."] if others else []
        told += [f"Not {e}: {reason}" for e, reason in self._dropped.items()]
        return " ".join(told)


def rivals(operations, overhead):
    """The engines worth a trial beside `graph`, the more promising first."""
    if not on_gpu() and any(op.startswith(CONVOLUTIONS) for op in operations):
        return ("jit",)
    return ("scan", "jit") if overhead else ("jit", "scan")


def uncompilable(program):
    """Why XLA cannot compile a step, as far as the step itself says; empty if it says nothing."""
    program.step  # noqa: B018  traced: then its layout is there
    return "; ".join(dict.fromkeys(program.layout.notes))


def may_try(program):
    """Whether a trial of the step can be taken back, and its batches and variables allow one."""
    specs = flat(program.spec)
    if not all(isinstance(s, tf.TensorSpec) and s.dtype != tf.string for s in specs):
        return False
    return UNREPEATABLE.isdisjoint(program.operations) and nbytes(program.variables) < host_bytes()


@contextlib.contextmanager
def unchanged(variables):
    """Sets variables back to what they were. What they were is kept in the machine's memory."""
    with tf.device("CPU:0"):
        values = [tf.identity(v.read_value()) for v in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
