"""Profile: a trace of some steps for TensorBoard, of those after the first, which hold the tracing of graphs."""

AFTER = 5  # steps of this process that are not traced
STEPS = 20  # that are, at least


class Profile:
    """Traces some steps of a run into `folder`, once."""

    def __init__(self, asked):
        self.folder = None
        self._state = "waiting" if asked else "done"
        self._from = None  # the step after which it began to wait, or to trace

    def before_chunk(self, step):
        if self._state == "waiting":
            self._from = step if self._from is None else self._from
            if step - self._from >= AFTER:
                import tensorflow as tf

                tf.profiler.experimental.start(str(self.folder))
                self._state, self._from = "tracing", step

    def after_chunk(self, step):
        if self._state == "tracing" and step - self._from >= STEPS:
            self.close()

    def close(self):
        if self._state == "tracing":
            import tensorflow as tf

            self._state = "done"
            tf.profiler.experimental.stop()
