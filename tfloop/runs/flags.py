"""The flags of every training binary, defined once.

`define()` at import, `check(argv)` first thing in `main`. Values are checked as they are parsed: a bad
one ends with absl's one line and status 1; what can be seen only afterwards (stray arguments, numbers
that are not finite) raises `Refused`, status 2. Nothing was trained or written by then.
"""

import copy
import math
import re
import sys
from typing import NamedTuple

from absl import flags

from tfloop.runs import workdir
from tfloop.runs.errors import Refused

LOGS = ("tensorboard", "csv")
PARAMETRIZATIONS = (
    "spectral_norm",
    "weight_norm",
    "unit_norm",
    "max_norm",
    "centered",
    "orthogonal",
    "bounded",
    "non_negative",
)

DEFAULTS = {
    "epochs": 5,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "data": "digits",
    "data_dir": None,
}


class Every(NamedTuple):
    """When checkpoints are saved: every `steps` updates, every `seconds`, else at the end of epochs."""

    steps: int | None = None
    seconds: float | None = None

    def __str__(self):
        if self.steps is not None:
            return str(self.steps)
        return "epoch" if self.seconds is None else f"{self.seconds:g}s"


class Watch(NamedTuple):
    """`--watch`: a statistic of the tensors that match a pattern."""

    pattern: str
    statistic: str

    def __str__(self):
        return f"{self.pattern}={self.statistic}"


class Parametrize(NamedTuple):
    """`--parametrize`: a parametrisation, with its numbers, of the weights that match a pattern."""

    pattern: str
    name: str
    numbers: tuple = ()

    def __str__(self):
        numbers = ",".join(f"{number:g}" for number in self.numbers)
        return f"{self.pattern}={self.name}" + (f":{numbers}" if numbers else "")


def parse_every(text):
    """`"100"` (steps), `"60s"`, `"epoch"`, or a number of steps, as an `Every`."""
    if isinstance(text, Every):
        return text
    text = str(text).strip()
    if text == "epoch":
        return Every()
    if re.fullmatch(r"\d{1,15}", text) and int(text) > 0:
        return Every(steps=int(text))
    seconds = finite(text[:-1]) if text.endswith("s") else None
    if seconds is not None and seconds > 0:
        return Every(seconds=seconds)
    raise ValueError(f"must be a number of steps (100), of seconds (60s) or 'epoch', got {text!r}")


def parse_watch(text):
    """`"encoder/*=rms"` as a `Watch`; without a statistic it is `rms`."""
    pattern, _, statistic = text.rpartition("=") if "=" in text else (text, "", "rms")
    if not pattern.strip() or not statistic.isidentifier():
        raise ValueError(f"must be pattern=statistic, as 'encoder/*=rms', got {text!r}")
    return Watch(pattern.strip(), statistic)


def parse_parametrize(text):
    """`"*/kernel=spectral_norm"` or `"*/kernel=max_norm:2"` as a `Parametrize`."""
    pattern, _, rest = text.rpartition("=")
    name, colon, numbers = rest.partition(":")
    parsed = [finite(number) for number in numbers.split(",")] if colon else []
    if not pattern.strip() or name not in PARAMETRIZATIONS or None in parsed:
        raise ValueError(
            f"must be pattern=name, as '*/kernel=spectral_norm', or pattern=name:number, got {text!r}; "
            f"names: {', '.join(PARAMETRIZATIONS)}"
        )
    return Parametrize(pattern.strip(), name, tuple(parsed))


def parse_log(text):
    """`"tensorboard,csv"` as a tuple; `""` and `"none"` as an empty one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))
    if unknown := [name for name in names if name not in LOGS]:
        raise ValueError(f"there is no log {unknown[0]!r}; choose of {', '.join(LOGS)} or none")
    return tuple(dict.fromkeys(names))


def finite(text):
    """The finite number a text says, or `None`."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


class _Parser(flags.ArgumentParser):
    """An absl parser of one of the functions above."""

    def __init__(self, parse):
        self._parse = parse

    def parse(self, argument):
        return self._parse(argument)


class _Text(flags.ArgumentSerializer):
    def serialize(self, value):
        return ",".join(value) if type(value) is tuple else str(value)


class _Finite(flags.FloatParser):
    """A float that is neither infinite nor NaN: absl's own bounds let NaN pass."""

    def convert(self, argument):
        number = super().convert(argument)
        if not math.isfinite(number):
            raise ValueError(f"must be finite, got {argument!r}")
        return number


def define(flag_values=flags.FLAGS, **defaults):
    """Defines the flags; once, later calls only set defaults. `defaults`: `epochs=20`, `data="mnist"`, ...

    A binary adds its own by absl's `flags.DEFINE_...`.
    """
    if unknown := [name for name in defaults if name not in (*DEFAULTS, *_NAMES)]:
        raise ValueError(f"There is no flag {unknown[0]!r} to set a default of.")
    if "workdir" not in flag_values:
        _define(flag_values)
    for name, value in defaults.items():
        flag_values.set_default(name, value)


_NAMES = (
    *("workdir", "epochs", "batch_size", "learning_rate", "seed", "deterministic", "jit", "precision"),
    *("strategy", "accumulate", "watch", "parametrize", "checkpoint_every", "keep", "resume", "on_nan"),
    *("progress", "log", "dry_run", "overfit_one_batch", "profile", "verify", "data", "data_dir"),
)


def _define(to):
    def text(name, default, says):
        flags.DEFINE_string(name, default, says, flag_values=to)

    def boolean(name, says):
        flags.DEFINE_boolean(name, False, says, flag_values=to)

    def count(name, default, says, least=1, most=None):
        flags.DEFINE_integer(name, default, says, lower_bound=least, upper_bound=most, flag_values=to)

    def choice(name, values, says):
        flags.DEFINE_enum(name, values[0], values, says, flag_values=to)

    def parsed(name, default, says, parse):
        flags.DEFINE(_Parser(parse), name, default, says, serializer=_Text(), flag_values=to)

    def repeated(name, says, parse):
        flags.DEFINE_multi(_Parser(parse), _Text(), name, [], says, flag_values=to)

    text("workdir", None, "Run folder; a new numbered one under runs/ if not given.")
    count("epochs", DEFAULTS["epochs"], "Passes over the data, in all.")
    count("batch_size", DEFAULTS["batch_size"], "Examples a batch, over all replicas.")
    flags.DEFINE(
        _Finite(lower_bound=0.0),
        "learning_rate",
        DEFAULTS["learning_rate"],
        "Learning rate.",
        serializer=flags.ArgumentSerializer(),
        flag_values=to,
    )
    count("seed", 0, "Seed of everything random.", least=0, most=2**32 - 1)
    boolean("deterministic", "Deterministic operations, and an engine chosen without a clock.")
    choice("jit", ["auto", "off", "step", "loop"], "What XLA compiles: nothing, the step or the chunk.")
    choice("precision", ["float32", "mixed_bfloat16", "mixed_float16"], "Keras' dtype policy.")
    choice("strategy", ["none", "mirrored", "multiworker"], "How the batch is distributed.")
    count("accumulate", 1, "Batches that make one update.")
    repeated("watch", "pattern=statistic, to log.", parse_watch)
    repeated("parametrize", "pattern=parametrisation, of weights.", parse_parametrize)
    parsed("checkpoint_every", "epoch", "Steps (100), seconds (60s) or epoch.", parse_every)
    count("keep", 3, "Checkpoints kept, besides the best.")
    choice("resume", list(workdir.RESUME), "What to do with a folder that holds a run.")
    choice("on_nan", ["stop", "skip", "rollback", "ignore"], "What to do when numbers are not finite.")
    choice("progress", ["auto", "bar", "line", "none"], "How progress is shown.")
    parsed("log", "tensorboard", "Logs besides metrics.jsonl: tensorboard,csv.", parse_log)
    boolean("dry_run", "Show shapes, parameters and names; train and write nothing.")
    boolean("overfit_one_batch", "Train on the first batch again and again.")
    boolean("profile", "Trace some steps for TensorBoard.")
    boolean("verify", "Train the first steps twice, and compare.")
    text("data", DEFAULTS["data"], "Data set.")
    text("data_dir", DEFAULTS["data_dir"], "Where data sets are kept.")


def check(argv, flag_values=flags.FLAGS):
    """Refuses what parsing lets pass. `argv`: what absl's `app.run` hands to `main`."""
    if stray := list(argv[1:]):
        hint = f" Did you mean --{stray[0].lstrip('-')}?" if stray[0].lstrip("-") in flag_values else ""
        raise Refused(f"Unexpected argument {stray[0]!r}: flags are written --name=value.{hint}")
    if any(given.lstrip("-").startswith("undefok") for given in sys.argv[1:]):
        raise Refused("--undefok is refused: it lets misspelt flags pass.")
    for name in _own_names(flag_values):
        value = flag_values[name].value
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise Refused(f"--{name}={value}: a number must be finite.")
    if "learning_rate" in flag_values and flag_values["learning_rate"].value == 0:
        raise Refused("--learning_rate=0.0: it must be positive.")


def leftovers(argv, flag_values=flags.FLAGS):
    """What is no flag in `argv`, its first entry included; parsing is done on a copy."""
    return copy.deepcopy(flag_values)(argv)


def values(flag_values=flags.FLAGS):
    """`name -> value` of tfloop's and the binary's flags, as JSON holds them, for `config.json`."""
    return {name: _as_json(flag_values[name].value) for name in _own_names(flag_values)}


# Modules whose flags are about logging and testing, not about the training.
_OTHERS = ("absl", "tensorflow", "keras")


def _own_names(flag_values):
    modules = flag_values.flags_by_module_dict()
    return sorted(
        flag.name for module, defined in modules.items() if module.split(".")[0] not in _OTHERS for flag in defined
    )


def _as_json(value):
    if type(value) in (list, tuple):
        return [_as_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)
