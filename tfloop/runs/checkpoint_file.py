"""One checkpoint on disk: a folder of two files, of which nothing is believed until it is checked.

    step-0000000100/tensors.safetensors    every tensor by name
    step-0000000100/manifest.json          {"sha256": ..., "content": {...}}

The content: `format`, `step`, `metrics` (by which the best is chosen), `files` (size and SHA-256 of
each), `tensors` (dtype and shape of each, so that a model is compared before a tensor is read) and
`manifest`, which is the caller's. `sha256` is that of the content as `json.dumps` writes it.

Nothing is unpickled. Links, names that leave the folder, wrong sizes and shapes that the file is too
small for are refused before anything is read or allocated.
"""

import functools
import hashlib
import hmac
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfloop.runs import files

TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"
FORMAT = 1
LARGEST_MANIFEST = 64 * 2**20
BLOCK = 2**20

# What the format calls the dtypes that it holds: those of NumPy, and those of ml_dtypes.
NUMPY_DTYPES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
ML_DTYPES = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
DTYPES = NUMPY_DTYPES | ML_DTYPES

_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")


class Damaged(Exception):
    """A checkpoint that is not whole, or not to be trusted. The text says why."""


class Spec(NamedTuple):
    """What a tensor is, apart from its values."""

    dtype: str
    shape: tuple

    def __str__(self):
        return f"{self.dtype}{list(self.shape)}"


class Content(NamedTuple):
    """What a manifest says."""

    step: int
    metrics: dict
    files: dict
    tensors: dict
    manifest: dict


def folder_name(step, rewrite=0):
    """`step-0000000100`; written again at the same step `step-0000000100-1`, `-2`, ..."""
    return f"step-{step:010d}" + (f"-{rewrite}" if rewrite else "")


def order(name):
    """`(step, rewrite)` of a folder's name, or `None` if it is not a checkpoint's."""
    match = _NAME.fullmatch(name)
    return match and (int(match[1]), int(match[2] or 0))


def spec(value):
    """The `Spec` of an array or a variable."""
    return Spec(_name_of(value.dtype), tuple(map(int, value.shape)))


@functools.cache  # NumPy makes the name anew each time, which takes 5 us
def _name_of(dtype):
    return str(getattr(dtype, "name", dtype))


def checked(tensors):
    """`tensors` as arrays; `TypeError` if one is of a dtype that cannot be saved."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    for name, array in arrays.items():
        if _name_of(array.dtype) not in DTYPES:
            raise TypeError(f"A checkpoint cannot hold {name!r} of dtype {array.dtype}.")
    return arrays


# Writing


def write(folder, step, tensors, manifest, metrics, at):
    """Writes both files into `folder` and flushes them and the folder.

    `manifest`: JSON, as `to_json` makes it. `at(point)` is for tests.
    """
    # The largest items first: each tensor begins at a multiple of its item's size.
    ordered = dict(sorted(tensors.items(), key=lambda named: -named[1].dtype.itemsize))
    data = {name: _bytes(tensor) for name, tensor in ordered.items()}
    parts = [_header(ordered, data), *data.values()]
    digest = hashlib.sha256()
    with open(folder / TENSORS, "wb") as file:
        for index, part in enumerate(parts):
            if index == len(parts) // 2:
                at("half of the tensors")
            digest.update(part)
            file.write(part)
        files.flush_file(file)
    at("tensors")
    content = {
        "format": FORMAT,
        "step": step,
        "metrics": files.encoded(metrics),
        "files": {TENSORS: {"size": sum(map(len, parts)), "sha256": digest.hexdigest()}},
        "tensors": {name: spec(tensor) for name, tensor in tensors.items()},
    }
    text = f'{json.dumps(content, allow_nan=False)[:-1]}, "manifest": {manifest}}}'
    if len(text) > LARGEST_MANIFEST // 2:
        raise ValueError(f"The manifest would have {len(text)} bytes; arrays belong to the tensors.")
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(f'{{"sha256": "{_sha256(text)}",\n"content": {text}}}\n')
        files.flush_file(file)
    at("manifest")
    files.flush_folder(folder)
    at("folder")


def _bytes(tensor):
    """The bytes of an array, little-endian, without a copy where it has them so."""
    return np.asarray(tensor, tensor.dtype.newbyteorder("<"), order="C").reshape(-1).view(np.uint8)


def _header(tensors, data):
    """What stands before the tensors' bytes: the library's own writer holds all of them twice in memory."""
    entries, start = {}, 0
    for name, tensor in tensors.items():
        end = start + len(data[name])
        code = DTYPES[_name_of(tensor.dtype)]
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# Checking


def read_content(folder):
    """The checked manifest of a checkpoint. The tensors' file is not opened."""
    folder = Path(folder)
    try:
        if not files.is_folder(folder):
            raise Damaged("it is a link or no folder")
        with files.open_regular(folder / MANIFEST) as file:
            if os.fstat(file.fileno()).st_size > LARGEST_MANIFEST:
                raise Damaged(f"{MANIFEST} is larger than {LARGEST_MANIFEST} bytes")
            text = file.read(LARGEST_MANIFEST).decode("utf-8")
        return _content(text, folder.name)
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error!r}") from error


def _content(text, folder_name):
    raw = json.loads(text)
    again = json.dumps(raw["content"], allow_nan=False)
    if not hmac.compare_digest(_sha256(again), str(raw["sha256"])):
        raise Damaged(f"{MANIFEST} does not have the SHA-256 it should have")
    content = files.from_json(again)
    if content["format"] != FORMAT:
        raise Damaged(f"{MANIFEST} is of format {content['format']!r}, and this is {FORMAT}")
    place = order(folder_name)
    if place and place[0] != content["step"]:
        raise Damaged(f"{MANIFEST} is of step {content['step']!r}")
    for name in content["files"]:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise Damaged(f"{MANIFEST} names a file outside the checkpoint: {name!r}")
    if set(content["files"]) != {TENSORS}:
        raise Damaged(f"{MANIFEST} names other files than {TENSORS}: {sorted(content['files'])}")
    if type(content["files"][TENSORS]["size"]) is not int:
        raise Damaged(f"{MANIFEST} gives no size of {TENSORS}")
    tensors = {name: _spec(name, *said) for name, said in content["tensors"].items()}
    return Content(
        step=content["step"],
        metrics=dict(content["metrics"]),
        files=content["files"],
        tensors=tensors,
        manifest=content["manifest"],
    )


def _spec(name, dtype, shape):
    sizes_are_counts = all(type(size) is int and size >= 0 for size in shape)
    if dtype not in DTYPES or not sizes_are_counts:
        raise Damaged(f"{name!r} is declared as {dtype!r} {shape!r}")
    return Spec(dtype, tuple(shape))


def verify(folder):
    """The `Content` of a checkpoint whose every byte is as it was written; else `Damaged`."""
    folder = Path(folder)
    content = read_content(folder)
    said = content.files[TENSORS]
    try:
        found = os.lstat(folder / TENSORS)
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{TENSORS} is a link or no plain file")
        if found.st_size != said["size"]:
            raise Damaged(f"{TENSORS} has {found.st_size} bytes, not {said['size']}")
        needed = sum(math.prod(t.shape) * dtype_of(t.dtype).itemsize for t in content.tensors.values())
        if needed > found.st_size:
            raise Damaged(f"{TENSORS} is too small for the shapes declared ({needed} bytes)")
        with files.open_regular(folder / TENSORS) as file:
            if not hmac.compare_digest(_sha256_of(file), str(said.get("sha256"))):
                raise Damaged(f"{TENSORS} does not have the SHA-256 it should have")
    except OSError as error:
        raise Damaged(f"{TENSORS}: {error.strerror or error}") from error
    return content


def _sha256_of(file):
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


def dtype_of(name):
    """The NumPy dtype of a name."""
    if name in ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def read_tensors(folder, content, names=None):
    """`name -> array` for the tensors of a verified checkpoint (of some `names`)."""
    import safetensors

    with files.open_regular(Path(folder) / TENSORS) as file:
        data = file.read()
    try:
        stored = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise Damaged(f"{TENSORS} cannot be read: {error}") from error
    if set(stored) != set(content.tensors):
        raise Damaged(f"{TENSORS} does not hold the tensors that {MANIFEST} lists")
    arrays = {}
    for name in content.tensors if names is None else names:
        said, tensor = content.tensors[name], stored[name]
        dtype = dtype_of(said.dtype)
        if tuple(tensor["shape"]) != said.shape:
            raise Damaged(f"{name!r} has shape {tensor['shape']} and {list(said.shape)} is declared")
        if len(tensor["data"]) != math.prod(said.shape) * dtype.itemsize:
            raise Damaged(f"{name!r} is not the {said} that is declared")
        arrays[name] = np.frombuffer(tensor["data"], dtype).reshape(said.shape)
    return arrays


def differences(saved, expected):
    """How two sets of `name -> Spec` differ, a line each, both ways."""
    lines = [f"{n!r} {s} is in the checkpoint only" for n, s in saved.items() if n not in expected]
    lines += [f"{n!r} {s} is in the model only" for n, s in expected.items() if n not in saved]
    lines += [
        f"{n!r} is {s} in the checkpoint and {expected[n]} in the model"
        for n, s in saved.items()
        if n in expected and s != expected[n]
    ]
    return lines
