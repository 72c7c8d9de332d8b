"""Signals: SIGTERM and the first Ctrl-C ask the run to stop after the step; the second Ctrl-C stops at once."""

import contextlib
import signal
import sys
import threading


class Stop:
    """What was asked for: `signal` is `None` as long as nothing was."""

    def __init__(self):
        self.signal = None
        self.ended = False  # whether it was obeyed

    def ask(self, number, frame=None):
        """A signal handler."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        how = ", once more to stop at once" if number == signal.SIGINT else ""
        print(f"\n{name}: finishing the step and saving{how}.", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def listening(self):
        """While in the block the signals come here. Only the main thread can listen: elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def is_due(self, team):
        """Whether to stop: where several processes train together, when one of them was asked to."""
        if team.size == 1:
            return self.signal is not None
        terminated, interrupted = team.sums(self.signal == signal.SIGTERM, self.signal == signal.SIGINT)
        if not terminated and not interrupted:
            return False  # what has come since then is heard the next time
        self.signal = signal.SIGTERM if terminated else signal.SIGINT
        return True

    def end(self):
        """Leaves as the signal would have: `KeyboardInterrupt`, or exit status 143."""
        self.ended = True
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + int(self.signal))
