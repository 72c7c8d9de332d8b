"""The configuration of a run, and what may differ when it goes on.

`config.json` holds `flags`, `seed`, `training`, `versions`, `threads`, `engine` and whatever a binary adds.
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np

from tfloop.runs import files

# May be chosen anew at every start.
FREE = frozenset(
    "epochs checkpoint_every keep progress log on_nan strategy profile"  # the contract's list
    " workdir resume data_dir dry_run verify".split()  # where and how it is run, not what it computes
)
# Differences that may change the last bits, and nothing else.
WARNED = ("versions", "threads", "machine")
# Chosen by the run itself: taken from what was recorded.
RECORDED = ("engine", "choice")


# What is said in code. An entry that is on one side only says nothing: an earlier version wrote none, and of an
# optimizer in use there is none.
TRAINING = "training"


class Changes(NamedTuple):
    """Differences as lines `flags/seed: 0 -> 1`, by what follows from them."""

    refused: list
    warned: list
    allowed: list


def changes(before, now, partial=False):
    """How a configuration differs from the recorded one. Both are what JSON can hold.

    `partial`: whether the model may be another one; then so may what trains it.
    """
    found = Changes([], [], [])
    both = before.get(TRAINING, {}).keys() & now.get(TRAINING, {}).keys()
    before, now = (
        {**side, TRAINING: {k: v for k, v in side.get(TRAINING, {}).items() if k in both}} for side in (before, now)
    )
    old, new = dict(_flat("", before)), dict(_flat("", now))
    for path in dict.fromkeys([*old, *new]):
        if path in old and path in new and _equal(old[path], new[path]):
            continue
        top, *rest = path.split("/")
        if top in RECORDED:
            continue
        if top == "flags" and rest and rest[0] in FREE:
            kind = found.allowed
        elif top in WARNED or (partial and top == TRAINING):
            kind = found.warned
        else:
            kind = found.refused
        kind.append(f"{path}: {_shown(old, path)} -> {_shown(new, path)}")
    return found


def _flat(path, value):
    """Yields `(path, leaf)`. Lists are leaves."""
    if not isinstance(value, dict):
        yield path, value
    for name, item in value.items() if isinstance(value, dict) else ():
        yield from _flat(f"{path}/{name}" if path else str(name), item)


def _equal(a, b):
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _shown(values, path):
    return repr(values[path]) if path in values else "(not set)"


def described(value):
    """A value of the code as JSON holds it: of an object its class and Keras' `get_config`, of an array a hash, of a
    function its name, as what it does cannot be told. Without the names that Keras gives."""
    value = files.plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, tuple(files.PLAIN)):
        return value
    if isinstance(value, dict):
        if "class_name" in value and isinstance(value.get("config"), dict):  # an object within another's config
            value = {**value, "config": {k: v for k, v in value["config"].items() if k != "name"}}
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(described, value))
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if hasattr(value, "__array__"):
        array = np.ascontiguousarray(value)
        content = str(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        return f"{array.dtype}{list(array.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    if isinstance(value, type) or not hasattr(value, "get_config"):
        return getattr(value, "__name__", type(value).__name__)
    try:
        config = dict(value.get_config())
    except Exception:  # a class of the user's that does not say
        config = {}
    config.pop("name", None)
    return {"class": type(value).__name__, **described(config)}
