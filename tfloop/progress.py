"""Progress: how far a loop is, how fast it goes and what it measures, on one line.

`Progress` takes what the loop tells it and reads the clock. What is known is a `State`, which
`progress_line` writes as text; `progress_display` decides where that text goes and how often.
None of them knows a model.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO, TypeVar

import numpy as np

from tfloop.progress_display import display
from tfloop.progress_line import Mark, State

T = TypeVar("T")
Values = Mapping[str, Any] | Iterable[tuple[str, Any]]


class Progress:
    """The progress of a loop of one's own, with the semantics of `keras.utils.Progbar`.

    ```python
    bar = tfloop.Progress(total=100, stateful=["learning_rate"])
    for step in range(100):
        bar.update(step + 1, {"loss": 1.0 / (step + 1), "learning_rate": 1e-3})
    ```

    A value is averaged over the steps, weighted by the number of steps since the last call, unless
    it is stateful: then it is shown as given. The last line shows the same averages (Keras' shows
    the last value there). The last line is written when `current` reaches `total`, or by `finish`.

    The time of the first update is left out of the live speed: it holds the tracing. The last line counts it.

    Args:
        total: number of steps; None where it is not known.
        stateful: names of the values shown as given, or True for all of them.
        start: steps done before, by an earlier process. They count as progress, not as speed.
        title: what stands first on the line, for instance `"validation"`.
        epoch: index of this epoch, from 0 as in Keras' callbacks; shown as `Epoch 1/5`.
        epochs: number of epochs.
        verbose: 0 or `"none"`: nothing. 1 or `"auto"`: a bar on a terminal and in a notebook, a line
            every few seconds elsewhere. 2: only the last line. `"bar"`, `"line"`: that, wherever.
        transient: take the bar away at the end and write no last line, as suits a validation
            within an epoch.
        examples_per_step: number of examples of a step, where `update` is not told.
        file: where to write; standard output by default.
        clock: a function that returns seconds.

    Raises:
        ValueError: a negative `total`, a `start` beyond it, or an unknown `verbose`.
    """

    def __init__(
        self,
        total: int | None = None,
        stateful: Iterable[str] | bool = (),
        start: int = 0,
        *,
        title: str = "",
        epoch: int | None = None,
        epochs: int | None = None,
        verbose: int | str = "auto",
        transient: bool = False,
        examples_per_step: int | None = None,
        file: TextIO | None = None,
        clock=time.monotonic,
    ):
        if total is not None and total < 0:
            raise ValueError(f"total is a number of steps, or None if unknown. Got total={total}.")
        if start < 0 or (total is not None and start > total):
            raise ValueError(
                f"start is the number of steps already done, from 0 to total. Got start={start}, total={total}."
            )
        self._stateful = stateful if isinstance(stateful, bool) else frozenset(_names(stateful))
        self._examples_per_step = examples_per_step
        self._clock = clock
        self._sums: dict[str, tuple[float, float]] = {}  # name: weighted sum, weight
        began = Mark(start, 0, clock())
        self.state = State(total, _title(title, epoch, epochs), began, began, began)
        self._display = display(verbose, file, transient)
        self._next_draw = began.time + self._display.first_after
        self._ended = False

    @property
    def current(self) -> int:
        """The number of steps done."""
        return self.state.latest.step

    @property
    def values(self) -> dict[str, float]:
        """The values as the line shows them."""
        return dict(self.state.values)

    def update(
        self,
        current: int,
        values: Values | None = None,
        finalize: bool | None = None,
        *,
        examples: int | None = None,
    ) -> None:
        """Takes the number of steps done so far, and the values of the steps since the last call.

        Args:
            current: number of steps done so far.
            values: a dict or a list of pairs, name to number. An array counts as its mean.
            finalize: whether this ends the bar; by default if `current` has reached `total`.
            examples: number of examples in the steps since the last call.

        Raises:
            TypeError: a value that is not a number.
        """
        now = self._clock()
        steps = current - self.current
        if examples is None:
            examples = (self._examples_per_step or 0) * max(steps, 0)
        for name, value in _pairs(values):
            self._take(name, _number(name, value), max(steps, 1))
        self.state.advance(current, examples, now)
        self._ended = False
        if finalize is None:
            finalize = self.state.total is not None and current >= self.state.total
        if finalize:
            self._end(now, done=True)
        elif now >= self._next_draw:
            self._display.show(self.state, now)
            self._next_draw = now + self._display.interval

    def add(self, n: int, values: Values | None = None, *, examples: int | None = None) -> None:
        """Takes `n` more steps, as `update(current + n, values)`."""
        self.update(self.current + n, values, examples=examples)

    def finish(self, values: Values | None = None) -> None:
        """Writes the last line. `values` are final ones: they replace the averages of their names.

        An epoch of `fit` gives its logs here, the `val_` ones included. A second call without
        values writes nothing.
        """
        for name, value in _pairs(values):
            self.state.values[name] = _number(name, value)
            self._ended = False
        if not self._ended:
            self._end(self._clock(), done=True)

    def close(self) -> None:
        """Ends the display wherever the loop stands, for instance after an error."""
        if not self._ended:
            self._end(self._clock(), done=False)

    def __enter__(self):
        return self

    def __exit__(self, exception_type, *_):
        if exception_type is None:
            self.finish()
        else:
            self.close()

    def _take(self, name, value, weight):
        if self._stateful is True or (self._stateful and name in self._stateful):
            self.state.values[name] = value
            return
        total, count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = total, count = total + value * weight, count + weight
        self.state.values[name] = total / count

    def _end(self, now, done):
        self._ended = True
        self.state.done = done
        self._display.end(self.state, now)


def progress(
    iterable: Iterable[T],
    total: int | None = None,
    *,
    start: int = 0,
    count_examples: bool = True,
    **options: Any,
) -> Iterator[T]:
    """Yields what `iterable` yields and shows how far it is: `for batch in tfloop.progress(dataset)`.

    ```python
    for batch in tfloop.progress([np.ones((8, 2)), np.ones((8, 2))], verbose=0):
        assert batch.shape == (8, 2)
    ```

    Args:
        iterable: a `tf.data.Dataset`, a list, a generator, ...
        total: number of steps; by default the length of `iterable` where it has one, plus `start`.
        start: steps done before, by an earlier process; `iterable` holds those that remain.
        count_examples: whether the first axis of a batch's first array is its number of examples.
        **options: as of `tfloop.Progress`: `title`, `epoch`, `epochs`, `verbose`, `file`, ...
    """
    if total is None:
        length = _length(iterable)
        total = None if length is None else length + start
    return _follow(iterable, Progress(total, start=start, **options), count_examples)


def _follow(iterable, bar, count_examples):
    try:
        for batch in iterable:
            yield batch
            bar.update(bar.current + 1, finalize=False, examples=_examples(batch) if count_examples else 0)
        bar.finish()
    finally:
        bar.close()


def _title(title, epoch, epochs):
    if epoch is None:
        return title
    count = f"Epoch {epoch + 1}" if epochs is None else f"Epoch {epoch + 1}/{epochs}"
    return f"{count} {title}".strip()


def _names(stateful):
    return [stateful] if isinstance(stateful, str) else stateful or ()


def _pairs(values):
    if values is None:
        return ()
    return values.items() if isinstance(values, Mapping) else values


def _number(name, value):
    if isinstance(value, int | float):
        return float(value)
    try:
        value = getattr(value, "numpy", lambda: value)()  # NumPy itself takes no bfloat16 scalar of TensorFlow's
        return float(np.mean(np.asarray(value)).item())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(
            f"Progress shows numbers. Got {value!r} of type {type(value).__name__} for {name!r}."
        ) from error


def _length(iterable):
    try:
        return len(iterable)
    except TypeError:  # a generator, or a dataset whose size is unknown or infinite
        return None


def _examples(batch):
    """The first axis of the first array in a batch, or 0 where there is none."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, tuple | list):
        return next((n for n in map(_examples, batch) if n), 0)
    shape = getattr(batch, "shape", None)
    return int(shape[0]) if shape is not None and len(shape) and shape[0] is not None else 0
