"""A writer on a thread of its own, so that formatting and disks do not hold up the steps."""

import queue
import threading

from tfloop.runs.writers.writer import Writer

# Blocks that may wait; then `rows` waits for the thread. A block is about a tenth of a second.
WAITING = 64


class Threaded(Writer):
    """Hands everything to another writer on a thread, in order.

    An error of the writer surfaces at the next call of any method, once, and at `flush` and `close`,
    which wait until all that came before is written.
    """

    def __init__(self, writer):
        self.writer = writer
        self._queue: queue.Queue = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def _run(self):
        while (job := self._queue.get()) is not None:
            method, args, done = job
            try:
                getattr(self.writer, method)(*args)
            except BaseException as error:
                self._error = self._error or error
            if done is not None:
                done.set()

    def _put(self, method, *args, done=None):
        self._raise()
        if self._thread is None:
            raise ValueError("This writer is closed.")
        self._queue.put((method, args, done))

    def _raise(self):
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _call(self, method, *args):
        """Does it on the thread, after all that came before, and waits."""
        done = threading.Event()
        self._put(method, *args, done=done)
        done.wait()
        self._raise()

    def rows(self, split, steps, epoch, names, values, present=None):
        self._put("rows", split, steps, epoch, names, values, present)

    def histogram(self, name, step, edges, counts):
        self._put("histogram", name, step, edges, counts)

    def image(self, name, step, image):
        self._put("image", name, step, image)

    def resume(self, step, epoch):
        self._call("resume", step, epoch)

    def flush(self):
        self._call("flush")

    def close(self):
        if self._thread is None:
            return
        self._queue.put(("close", (), None))
        self._queue.put(None)
        self._thread.join()
        self._thread = None
        self._raise()
