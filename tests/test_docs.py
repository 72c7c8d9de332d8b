"""The code blocks of README.md and of the docstrings in tfloop run.

The blocks of one document, or of one docstring, run in order in one namespace that holds `tfloop`,
`tf`, `keras`, `np`, `ops` and `layers`. A block that starts with ```python no-run is left out.
"""

import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"^( *)```python( no-run)?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
MOST_LEFT_OUT = 5


def blocks(text):
    """The python blocks of a text: line of the first line of code, code, whether it runs."""
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(3)) + 1
        indent = len(match[1])
        code = "".join(line[indent:] or "\n" for line in match[3].splitlines(keepends=True))
        yield line, code, match[2] is None


def documents():
    """Every text with blocks: its name, the file and line it starts at, and the text."""
    yield "README.md", "README.md", 1, (ROOT / "README.md").read_text()
    seen = set()
    for module in _modules():
        yield module.__name__, module.__file__, 1, module.__doc__ or ""
        for name, member in vars(module).items():
            if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
                continue
            for path, documented in [(name, member), *_methods(name, member)]:
                if id(documented) not in seen and getattr(documented, "__doc__", None):
                    seen.add(id(documented))
                    file, line = _position(module, documented)
                    yield (
                        f"{module.__name__}.{path}",
                        file,
                        line,
                        inspect.cleandoc(documented.__doc__),
                    )


def _modules():
    import tfloop

    yield tfloop
    for found in pkgutil.walk_packages(tfloop.__path__, "tfloop."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def _methods(name, member):
    if inspect.isclass(member):
        for method, function in vars(member).items():
            function = getattr(function, "__func__", function)  # class and static methods
            if not method.startswith("_") and (callable(function) or isinstance(function, property)):
                yield f"{name}.{method}", function


def _position(module, documented):
    try:
        source = inspect.getsourcelines(inspect.unwrap(getattr(documented, "fget", documented)))
    except (OSError, TypeError):
        return module.__file__, 1
    return module.__file__, source[1]


def namespace():
    import keras
    import numpy as np
    import tensorflow as tf

    import tfloop

    keras.utils.set_random_seed(0)
    return {
        "__name__": "documentation",
        "tfloop": tfloop,
        "tf": tf,
        "keras": keras,
        "np": np,
        "ops": keras.ops,
        "layers": keras.layers,
    }


DOCUMENTS = [document for document in documents() if any(blocks(document[3]))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document[0])
def test_the_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, file, start, text = document
    variables = namespace()
    for line, code, runs in blocks(text):
        if runs:
            where = f"{file}:{start}, line {line} of the text of {name}"
            exec(compile(code, where, "exec"), variables)


def test_few_blocks_are_left_out():
    left_out = [name for name, _, _, text in DOCUMENTS for *_, runs in blocks(text) if not runs]
    assert len(left_out) <= MOST_LEFT_OUT, left_out


def test_blocks_are_found_with_their_lines():
    text = "a\n```python\nx = 1\n```\n  ```python no-run\n  y = 2\n\n  z = 3\n  ```\n```\nno\n```\n"
    assert list(blocks(text)) == [(3, "x = 1\n", True), (6, "y = 2\n\nz = 3\n", False)]
