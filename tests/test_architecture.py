"""The import rule: imports point one way, experiments use public names, Keras' inside has one door.

Only the sources are read, nothing is imported, so this runs first and takes a moment.
"""

import ast
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A module may import modules of the rows above its own, and those that share its entry, which are
# one part of the architecture in several files. A package is one part.
ROWS = (
    ("_keras",),
    ("names", "operation", "plain", "step", "progress progress_line progress_display"),
    (
        "statistics",
        "accumulation",
        "tensors",
        "reproducibility",
        "batch_norm",
        "keeping",
        "numpy_loss finite_differences",
        "prediction",
    ),
    ("terms", "weights", "averaging"),  # a weight knows no loss
    ("layer", "loop"),  # the loop knows a model only as something with steps, state and terms
    ("model model_step replicas row steps",),
    ("runs",),
    ("weight_mean",),  # reads checkpoints of a run
)
PLACES = {module: (row, part) for row, parts in enumerate(ROWS) for part in parts for module in part.split()}

INSIDE = ("keras.src", "tensorflow.python")  # not their public API
DOOR = "tfloop._keras"


def test_every_source_keeps_the_import_rule():
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for module, path in MODULES.items()
        for line, fault in faults_of(path.read_text(), module, MODULES, PUBLIC)
    ]
    assert not faults, "\n" + "\n".join(faults)


def test_every_module_has_a_place():
    strays = [module for module in MODULES if module.startswith("tfloop.") and not _place(module)]
    assert not strays, f"give them a place in ROWS: {strays}"


def test_no_import_goes_round_in_a_circle():
    graph = {
        module: {target for _, target, _ in imports_of(path.read_text(), module, MODULES)}
        for module, path in MODULES.items()
        if module.startswith("tfloop")
    }
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def faults_of(source, module, modules, public=()):
    """The breaches of the rule in a source, as pairs of a line and what is wrong there."""
    for line, target, name in imports_of(source, module, modules):
        if module.startswith("experiments"):
            fault = _fault_of_experiment(target, name, public)
        else:
            fault = _fault_of_library(module, target)
        if fault:
            yield line, fault
    for line, dotted in _names_in(source):
        inside = dotted.startswith(INSIDE) and module != DOOR
        if inside:
            yield line, f"{dotted} is no public API: only tfloop/_keras.py may use it"
        if module.startswith("experiments") and dotted.startswith("tfloop._"):
            yield line, f"{dotted} is private: an experiment uses public names"
    if module == "tfloop" or any(other.startswith(module + ".") for other in modules):
        for node in ast.parse(source).body:
            if module.startswith("tfloop") and not _re_exports(node):
                yield node.lineno, "an __init__.py only re-exports"


def imports_of(source, module, modules):
    """The imports in a source: line, imported module, and the name taken from it (or None)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, module, modules)
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                is_module = submodule in modules or _place(submodule) is not None
                yield ((node.lineno, submodule, None) if is_module else (node.lineno, origin, alias.name))


def _origin(node, module, modules):
    """The absolute name behind a `from` import."""
    if not node.level:
        return node.module
    is_package = any(other.startswith(module + ".") for other in modules)
    parents = module.split(".") if is_package else module.split(".")[:-1]
    parents = parents[: len(parents) - node.level + 1]
    return ".".join([*parents, *filter(None, [node.module])])


def _place(module):
    """Row and part of a module of the library, or None."""
    package, *rest = module.split(".")
    return PLACES.get(rest[0]) if package == "tfloop" and rest else None


def _fault_of_library(module, target):
    if module == "tfloop" or target.split(".")[0] not in ("tfloop", "experiments"):
        return None
    if target.startswith("experiments"):
        return "the library does not know the experiments"
    if target == "tfloop":
        return "import what is needed from the module that defines it, not from tfloop"
    here, there = _place(module), _place(target)
    for name, place in ((module, here), (target, there)):
        if place is None:
            return f"{name} has no place in ROWS of tests/test_architecture.py: give it one"
    if there[0] < here[0] or there == here:
        return None
    return f"{module} may not import {target}, which stands {_beside_or_above(here, there)} it"


def _beside_or_above(here, there):
    return "beside" if here[0] == there[0] else "above"


def _fault_of_experiment(target, name, public):
    if target.startswith("tfloop."):
        return f"{target} is a module of the library: an experiment says `import tfloop`"
    if target == "tfloop" and name is not None and name not in public:
        return f"{name} is not a public name of tfloop"
    return None


def _names_in(source):
    """Line and dotted name of what is imported, of attributes (`a.b.c`), of strings that are one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.count(".") == 1:
                yield node.lineno, re.sub(r"^tf\.", "tensorflow.", dotted)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"[\w.]+", node.value):
                yield node.lineno, node.value


def _re_exports(node):
    if isinstance(node, ast.Assign):  # __all__, __version__
        return all(isinstance(t, ast.Name) and t.id.startswith("__") for t in node.targets)
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, ast.Import | ast.ImportFrom)


def _modules():
    """The sources of the library and of the experiments, by module name."""
    found = {}
    for folder in ("tfloop", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _public(source):
    """The names that `tfloop/__init__.py` binds."""
    return {
        (alias.asname or alias.name)
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if not alias.name.startswith("_")
    }


MODULES = _modules()
PUBLIC = _public((ROOT / "tfloop/__init__.py").read_text())


# The check itself --------------------------------------------------------------------------------

SOME = {
    "tfloop": None,
    "tfloop.loop": None,
    "tfloop.loop.record": None,
    "tfloop.loop.source": None,
    "tfloop.model": None,
    "tfloop.terms": None,
}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("tfloop.terms", "import tfloop.model", "may not import tfloop.model"),
        ("tfloop.terms", "from tfloop import model", "stands above it"),
        ("tfloop.terms", "from tfloop.loop.record import Column", "may not import tfloop.loop"),
        ("tfloop.terms", "from .loop import record", "may not import tfloop.loop.record"),
        ("tfloop.terms", "def f():\n    from tfloop.model import Model", "may not import"),
        ("tfloop.loop.source", "from ..model import Model", "may not import tfloop.model"),
        ("tfloop.loop", "from tfloop.model import Model", "may not import tfloop.model"),
        ("tfloop.loop", "from tfloop.loop.source import Source\nx = 1", "only re-exports"),
        ("tfloop.weights.wrapper", "from tfloop import terms", "stands beside it"),
        ("tfloop.weights.wrapper", "from tfloop import Model", "from the module that defines it"),
        ("tfloop.model", "import tfloop", "from the module that defines it"),
        ("tfloop.model", "from experiments.vae import model", "does not know the experiments"),
        ("tfloop.stray", "from tfloop import names", "has no place in ROWS"),
        ("tfloop.model", "from tfloop.stray import thing", "has no place in ROWS"),
        ("tfloop.model", "from keras.src import backend", "no public API"),
        ("tfloop.model", "import keras\nkeras.src.backend.x()", "no public API"),
        ("tfloop.model", "import_module('tensorflow.python.eager')", "no public API"),
        ("tfloop", "import os\nos.environ['A'] = 'b'", "only re-exports"),
        ("experiments.vae.model", "from tfloop.model import Model", "says `import tfloop`"),
        ("experiments.vae.model", "from tfloop import _keras", "is private"),
        ("experiments.vae.model", "from tfloop import Stranger", "not a public name"),
        ("experiments.vae.model", "import tfloop\ntfloop._keras.x", "is private"),
        ("experiments.vae.model", "import keras.src", "no public API"),
    ],
)
def test_a_breach_is_found(module, source, fault):
    faults = [text for _, text in faults_of(source, module, SOME, public={"Model"})]
    assert any(fault in text for text in faults), faults


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tfloop._keras", "from keras.src import backend"),
        ("tfloop.terms", '"""Reads keras.src, it says."""\nfrom tfloop import names, statistics'),
        ("tfloop.loop.source", "from tfloop.loop import record\nfrom .record import Column"),
        ("tfloop.loop", '"""The loop."""\nfrom tfloop.loop.source import Source\n__all__ = []'),
        ("tfloop.progress", "from tfloop.progress_line import State"),
        ("tfloop.runs.binary", "from tfloop import model, weights\nfrom tfloop.loop import Source"),
        ("tfloop", "from tfloop.model import Model\n__version__ = '1'"),
        ("experiments.vae.model", "import tfloop\nfrom tfloop import Model\ntfloop.tag(1, 'a')"),
        ("experiments.vae.__main__", "from experiments.vae.model import VAE"),
    ],
)
def test_what_is_allowed_is_not_reported(module, source):
    assert not list(faults_of(source, module, SOME, public={"Model"}))
