"""Processes that have imported everything already: forked from one that has, and has built nothing yet.

A training process takes seconds to import TensorFlow; the tests of kills need many of them.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent


class Nursery:
    """`run(folder, *flags)` runs a script of these tests in a fresh process to its end, or kills it on the way."""

    def __init__(self, script=HERE / "runs" / "stateful.py"):
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, __file__, str(script)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout.readline() == "ready\n"

    def close(self):
        self._process.stdin.close()
        self._process.wait(30)

    def run(self, folder, *arguments, signals=(), after=None, timeout=180, environment=None, out=None, **knobs):
        """Returns `(exit status, output)`. `after(folder)` becomes true, then each `(seconds, number)` of `signals`
        is waited for and sent. `knobs`: see the script."""
        out = out or Path(folder).with_suffix(".out")
        job = {"argv": ["script.py", f"--workdir={folder}", *arguments], "out": str(out), "knobs": knobs}
        job["environment"] = environment or {}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        timer = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
        timer.start()
        sender = threading.Thread(target=self._send, args=(pid, folder, signals, after), daemon=True)
        sender.start()
        status = int(self._process.stdout.readline())
        timer.cancel()
        return status, re.sub(r"(?m)^(WARNING: All log|[IWE]0000).*\n", "", out.read_text())

    def _send(self, pid, folder, signals, after):
        try:
            while after is not None and not after(folder):
                time.sleep(0.005)
                os.kill(pid, 0)
            for seconds, number in signals:
                time.sleep(seconds)
                os.kill(pid, number)
        except ProcessLookupError:  # it was over before
            pass


def serve(script):
    sys.path.insert(0, str(Path(script).parent))
    module = importlib.import_module(Path(script).stem)
    module.define()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(module, job)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def child(module, job):
    from absl import app

    descriptor = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = job["argv"]
    os.environ.update(job["environment"])
    module.KNOBS.update(job["knobs"])
    status = 1
    try:
        app.run(module.main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
