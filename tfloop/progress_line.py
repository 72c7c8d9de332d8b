"""The line of a progress display: what is known of a loop, and that as text for a width and a time."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

FULL, EMPTY, CUT = "━─…"
LONGEST_BAR = 20
SHORTEST_BAR = 5


class Mark(NamedTuple):
    """A moment of the loop."""

    step: int
    examples: int
    time: float


@dataclass
class State:
    """What is known of a loop. The speed is that between `timed_from` and `latest`."""

    total: int | None
    title: str
    began: Mark
    timed_from: Mark
    latest: Mark
    values: dict[str, float] = field(default_factory=dict)
    done: bool = False

    def advance(self, step: int, examples: int, now: float) -> None:
        if step == self.latest.step:
            return
        if self.timed_from is self.began:
            self.timed_from = self.latest  # the beginning, then the first update for good
        self.latest = Mark(step, self.latest.examples + examples, now)

    def rate(self, what: str, whole: bool = False) -> float | None:
        """`"step"` or `"examples"` a second, of this process only; None where not known yet.

        `whole`: over all the time that went by, tracing included.
        """
        since = self.began if whole else self.timed_from
        seconds = self.latest.time - since.time
        number = getattr(self.latest, what) - getattr(since, what)
        return number / seconds if seconds > 0 and number > 0 else None

    def eta(self, now: float) -> float | None:
        """Seconds until the last step; None where the total or the speed is not known."""
        rate = self.rate("step")
        if self.total is None or rate is None:
            return None
        return max(0.0, (self.total - self.latest.step) / rate - (now - self.latest.time))


def render_line(state: State, now: float, width: int | None = None) -> str:
    """The state as one line of at most `width` columns; with no `width` all of it, without a bar.

    Where there is little room the bar goes first, then the speeds, the later values, the time left.
    """
    title, count, values, times = _fields(state, now)
    if width is None:
        return _join([title, count, " - ".join(values), *times])
    for title_shown, times_shown, values_wanted in _choices(len(times), len(values)):
        head = [title, count] if title_shown else [count]
        tail = times[:times_shown]
        used = len(_join([*head, *tail]))
        shown = _fit(values, width - used - 2)
        if len(shown) >= values_wanted and used <= width:
            break
    if 0 < len(shown) < len(values):
        shown[-1] += f" {CUT}"
    columns = min(LONGEST_BAR, width - len(_join([*head, " - ".join(shown), *tail])) - 1)
    if columns >= SHORTEST_BAR and state.total:
        head[-1] += " " + _bar(state.latest.step / state.total, columns)
    return _join([*head, " - ".join(shown), *tail])[:width]


def render_last(state: State, now: float, width: int | None = None) -> str:
    """All of the state at the end, broken between fields into lines of at most `width` columns."""
    title, count, values, times = _fields(state, now, last=True)
    if width is None:
        return _join([title, count, " - ".join(values), *times])
    values = [value + " -" for value in values[:-1]] + values[-1:]
    lines = [""]
    for part in filter(None, [title, count, *values, *times]):
        gap = "" if not lines[-1] else " " if lines[-1].endswith("-") else "  "
        if len(lines[-1] + gap + part) <= width:
            lines[-1] += gap + part
        else:
            lines.append("  " + (part if len(part) <= width - 2 else CUT + part[3 - width :]))
    return "\n".join(lines)


def _fields(state, now, last=False):
    """The parts of a line: title, count, values, and the times in the order of their importance."""
    step, total = state.latest.step, state.total
    if total is None:
        total = step if state.done else "?"
    count = f"{step:>{len(str(total))}}/{total}"
    values = [f"{name}: {format_number(value)}" for name, value in state.values.items()]
    steps, examples, eta = state.rate("step", last), state.rate("examples", last), state.eta(now)
    elapsed = format_seconds(now - state.began.time)
    if last or eta is None or step >= total:
        times = [elapsed, steps and format_duration(1 / steps) + "/step"]
    else:
        times = [
            "ETA " + format_seconds(eta, decimals=0),
            steps and f"{format_rate(steps)} steps/s",
        ]
    times.append(examples and f"{format_rate(examples)} examples/s")
    return state.title, count, values, [text for text in times if text]


def _choices(times, values):
    """Whether the title, how many times and how many values at least, from rich to poor."""
    for shown in range(times, 0, -1):
        yield True, shown, values
    one = min(1, values)
    yield True, 2, min(3, values)
    yield from ((True, 1, one), (True, 0, one), (False, 0, one), (False, 1, 0), (False, 0, 0))


def _fit(values, room):
    """The first of `values` that fit together into `room` columns, with a mark if some do not."""
    shown: list[str] = []
    for value in values:
        mark = 0 if len(shown) + 1 == len(values) else 2
        if len(" - ".join([*shown, value])) + mark > room:
            break
        shown.append(value)
    return shown


def _join(fields):
    return "  ".join(filter(None, fields))


def _bar(share, columns):
    full = int(columns * min(max(share, 0.0), 1.0))
    return FULL * full + EMPTY * (columns - full)


def format_number(value: float) -> str:
    """`0.1234`, `-0.1234`, `1.2340e-05`: four decimals where they say something."""
    if value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e6:
        return f"{value + 0.0:.4f}"  # + 0.0: no sign on zero
    return f"{value:.4e}"


def format_seconds(seconds: float, decimals: int = 1) -> str:
    """`1.2s`, `34s`, `5:06`, `7:08:09`, `2d 03:04`."""
    if seconds < 9.95:
        return f"{seconds:.{decimals}f}s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02}"
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours < 24:
        return f"{hours}:{minutes:02}:{seconds % 60:02}"
    return f"{hours // 24}d {hours % 24:02}:{minutes:02}"


def format_duration(seconds: float) -> str:
    """`2.5s`, `9.4ms`, `218us`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_two_digits(seconds / size)}{unit}"
    return f"{_two_digits(seconds / 1e-6)}us"


def format_rate(rate: float) -> str:
    """`0.04`, `9.4`, `106`, `13.6k`, `2.1M`."""
    if rate >= 1e6:
        return f"{rate / 1e6:.1f}M"
    return f"{rate / 1e3:.1f}k" if rate >= 1e4 else _two_digits(rate)


def _two_digits(number):
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}" if number >= 1 else f"{number:.2f}"
