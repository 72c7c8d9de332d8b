"""A watchdog: says so when no step ends for a long time, and where the process is."""

import faulthandler
import sys
import threading
import time

from absl import logging

STALL = 600.0  # seconds without a step, after which something is said; then again after as many


class Watchdog:
    """Watches from a thread that `alive()` is called, while it is open as a context.

    Nothing tells a stall from a long step or a long validation, so nothing is ended.
    """

    def __init__(self, stall=STALL):
        self._stall = stall
        self._at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self):
        self._at = time.monotonic()

    def _watch(self):
        said = 0.0
        while not self._over.wait(self._stall / 10):
            seconds = time.monotonic() - max(self._at, said)
            if seconds >= self._stall:
                said = time.monotonic()
                minutes = (said - self._at) / 60
                logging.warning(
                    "No training step has ended for %.3g minutes. The threads of the process are at:", minutes
                )
                faulthandler.dump_traceback(sys.__stderr__)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()
