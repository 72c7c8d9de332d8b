"""Pace: how long chunks are."""


class Pace:
    """How many steps the next chunk has: about a tenth of a second's worth, or what the user asked for."""

    seconds = 0.1  # of a chunk
    most = 1024  # steps

    def __init__(self, steps_per_execution, by_step):
        self._fixed = 1 if by_step else None if steps_per_execution == "auto" else steps_per_execution
        self._count = self._fixed or 1
        self._ran = 0

    def capacity(self, steps):
        """The most steps that a chunk may have."""
        return self._fixed or min(self.most, steps or self.most)

    def expect(self, seconds):
        """Takes the time of a step, where that is known before the first chunk."""
        if self._fixed is None and seconds:
            self._count = max(1, min(self.most, int(self.seconds / seconds)))

    def next(self):
        return self._count

    def ran(self, steps, seconds):
        self._ran += 1
        if self._fixed is None and steps and self._ran > 1:  # the first call holds the tracing
            wanted = int(self.seconds * steps / max(seconds, 1e-9))
            self._count = max(1, min(self.most, wanted, 8 * self._count))
