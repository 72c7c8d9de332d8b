"""What is slow to import, or optional, is imported when it is used."""

import subprocess
import sys

from saver import REPOSITORY

CODE = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
from saver import without_tensorflow
without_tensorflow()
import tfloop.runs
LOOP = "binary run session environment callback_state sentry rehearsal".split()  # these drive the loop
for module in pkgutil.walk_packages(tfloop.runs.__path__, "tfloop.runs."):
    if module.name.split(".")[2] not in LOOP:
        importlib.import_module(module.name)
late = ("tensorflow", "keras", "matplotlib", "sklearn", "safetensors", "PIL")
print([name for name in late if name in sys.modules])
"""


def test_nothing_heavy_is_imported_before_it_is_used():
    command = [sys.executable, "-c", CODE, str(REPOSITORY / "tests" / "runs")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr
