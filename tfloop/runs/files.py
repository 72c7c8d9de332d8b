"""Files that are there whole or not at all, and are read without following a link.

A file is written aside, flushed to the disk, renamed into place, and the folder is flushed, so that
neither a kill nor a power loss leaves half of it.
"""

import json
import math
import os
import stat
from pathlib import Path


def flush_file(file):
    """Sends what was written to an open file down to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder):
    """Makes the names in a folder (files created, renamed, removed) survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder):
    """Creates a folder, its parents too, and flushes those that got a new name."""
    folder = Path(folder)
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)


def write_whole(path, data):
    """Replaces the content of a file by `data` (bytes), whole or not at all."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.aside")
    with open(aside, "wb") as file:
        file.write(data)
        flush_file(file)
    os.replace(aside, path)
    flush_folder(path.parent)


def open_regular(path):
    """Opens a file for reading; `OSError` if it is a link, a device or anything but a plain file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a plain file")
    return open(descriptor, "rb")


def is_folder(path):
    """Whether a path is a folder, and not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def exists(path):
    """Whether there is anything of this name, a broken link too."""
    return os.path.lexists(path)


def free_name(folder, name):
    """`folder/name`, or `folder/name.1`, `folder/name.2`, ... if there is something of that name."""
    candidate, count = Path(folder) / name, 0
    while exists(candidate):
        count += 1
        candidate = Path(folder) / f"{name}.{count}"
    return candidate


# JSON that any reader takes

PLAIN = frozenset({type(None), bool, int, float, str})  # what it holds as it is, but for floats that are not finite


def to_json(value, indent=None):
    """`value` as strict JSON text. A float that is not finite becomes `{"float": "inf"}`.

    The order of keys and every bit of a float are kept.
    """
    return json.dumps(encoded(value), indent=indent, allow_nan=False)


def from_json(text):
    """The value of `to_json`'s text. `ValueError` if it is no strict JSON."""
    try:
        return _decoded(json.loads(text, parse_constant=_refuse))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def encoded(value):
    """`value` as `json.dumps` takes it."""
    if isinstance(value, dict):
        return {_key(key): encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return value if _are_plain(value) else [encoded(item) for item in value]
    value = plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def plain(value):
    """A tensor as its array, and every scalar of NumPy's and TensorFlow's as Python's; anything else as it is."""
    if hasattr(value, "numpy"):
        value = value.numpy()
    return value.item() if hasattr(value, "item") and value.ndim == 0 else value


def numbers(values):
    """Those of a dict's values that are numbers, scalars of NumPy's and TensorFlow's too."""
    found = {name: plain(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _are_plain(values):
    """Whether these are finite floats, or numbers and texts that any JSON can hold: a history has thousands of them."""
    kinds = set(map(type, values))
    return kinds <= PLAIN - {float} or (kinds == {float} and all(map(math.isfinite, values)))


def _key(key):
    if not isinstance(key, str):
        raise TypeError(f"JSON objects have strings as keys, got {key!r}")
    return key


def _decoded(value):
    if isinstance(value, dict):
        if set(value) == {"float"} and value["float"] in ("inf", "-inf", "nan"):
            return float(value["float"])
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value


def _refuse(constant):
    raise ValueError(f"{constant} is no JSON")
