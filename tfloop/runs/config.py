"""The configuration of a run, and what may differ when it goes on.

`config.json` holds `flags`, `seed`, `versions`, `threads`, `engine` and whatever a binary adds.
"""

from typing import NamedTuple

# May be chosen anew at every start.
FREE = frozenset(
    "epochs checkpoint_every keep progress log on_nan strategy profile"  # the contract's list
    " workdir resume data_dir dry_run verify".split()  # where and how it is run, not what it computes
)
# Differences that may change the last bits, and nothing else.
WARNED = ("versions", "threads", "machine")
# Chosen by the run itself: taken from what was recorded.
RECORDED = ("engine", "choice")


class Changes(NamedTuple):
    """Differences as lines `flags/seed: 0 -> 1`, by what follows from them."""

    refused: list
    warned: list
    allowed: list


def changes(before, now):
    """How a configuration differs from the recorded one. Both are what JSON can hold."""
    found = Changes([], [], [])
    old, new = dict(_flat("", before)), dict(_flat("", now))
    for path in dict.fromkeys([*old, *new]):
        if path in old and path in new and _equal(old[path], new[path]):
            continue
        top, *rest = path.split("/")
        if top in RECORDED:
            continue
        if top == "flags" and rest and rest[0] in FREE:
            kind = found.allowed
        elif top in WARNED:
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
