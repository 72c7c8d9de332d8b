"""Where a progress line is shown and how often: a bar on a terminal, else lines, or nowhere.

A display has `show(state, now)`, called not more often than every `interval` seconds, and
`end(state, now)`. Rich draws the bar. It is imported when the first bar is drawn.
"""

import atexit
import math
import os
import sys
from typing import Any

from tfloop.progress_line import CUT, EMPTY, FULL, State, render_last, render_line

SECONDS_BETWEEN_FRAMES = 0.1
SECONDS_BETWEEN_LINES = 5.0
ASCII = {ord(FULL): "=", ord(EMPTY): ".", ord(CUT): "~"}
VERBOSE = ("auto", 0, 1, 2, "bar", "line", "none")


class _Nothing:
    """No display."""

    first_after = interval = math.inf

    def show(self, state, now):
        pass

    def end(self, state, now):
        pass


class _Lines:
    """A line every few seconds, and one at the end: for files, pipes and dumb terminals."""

    def __init__(self, file, transient, interval=SECONDS_BETWEEN_LINES):
        self.file, self.transient = file, transient
        self.first_after = self.interval = interval

    def show(self, state, now):
        self._write(render_line(state, now))

    def end(self, state, now):
        partial_epoch = self.interval == math.inf and not state.done
        if not self.transient and not partial_epoch:
            self._write(render_last(state, now))

    def _write(self, line):
        self.file.write(_encodable(line, self.file) + "\n")
        self.file.flush()


class _Bar:
    """A live bar; the terminal is shared with the bars it is nested in."""

    first_after = -math.inf
    interval = SECONDS_BETWEEN_FRAMES

    def __init__(self, file, transient):
        self.file, self.transient = file, transient

    def show(self, state, now):
        _Terminal.of(self.file).show(self, state, now)

    def end(self, state, now):
        _Terminal.of(self.file).end(self, state, now, self.transient)


class _Terminal:
    """The live lines at the bottom of a terminal, one a bar, the outermost first.

    What is printed meanwhile appears above them. Between two epochs nothing is held.
    """

    used: dict[Any, "_Terminal"] = {}

    @classmethod
    def of(cls, file):
        if file not in cls.used:
            cls.used[file] = cls(file)
        return cls.used[file]

    def __init__(self, file):
        from rich.console import Console

        self.file = file
        notebook = _is_notebook(file)
        self.console = Console(
            file=file,
            force_terminal=None if notebook else True,
            force_jupyter=notebook,
            highlight=False,
        )
        self.bars: dict[_Bar, tuple[State, float]] = {}
        self.live: Any = None

    def show(self, bar, state, now):
        self.bars[bar] = state, now
        if self.live is None:
            self._start()
        self.live.update(self._frame(), refresh=True)

    def end(self, bar, state, now, transient):
        self.bars.pop(bar, None)
        if self.live is not None:
            self.live.update(self._frame(), refresh=bool(self.bars))
        if not self.bars:
            self._stop()
        if not transient:
            last = render_last(state, now, self.console.width)
            self.console.print(self._text(last), no_wrap=True, crop=False)

    def _start(self):
        from rich.live import Live

        # Only what would reach this terminal anyway is led past the bar: a redirected standard
        # error stays where it was sent.
        self.live = Live(
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout is self.file,
            redirect_stderr=sys.stdout is self.file and _is_terminal(sys.stderr),
        )
        atexit.register(self._stop)
        self.live.start()

    def _stop(self):
        self.used.pop(self.file, None)
        if self.live is not None:
            atexit.unregister(self._stop)
            self.live.stop()
            self.live = None

    def _frame(self):
        from rich.console import Group

        width = self.console.width
        return Group(*[self._text(render_line(*bar, width)) for bar in self.bars.values()])

    def _text(self, line):
        from rich.text import Text

        text = Text(_encodable(line, self.file), no_wrap=True, overflow="crop")
        text.highlight_regex(f"{FULL}+", "green")
        text.highlight_regex(f"{EMPTY}+", "bright_black")
        text.highlight_regex(r"^Epoch \S+", "bold")
        text.highlight_regex(r"ETA \S+( \d\d:\d\d)?", "cyan")
        return text


def display(verbose, file, transient):
    """The display that `verbose` asks for and `file` (None: standard output) can show."""
    if verbose not in VERBOSE:
        raise ValueError(f"verbose is one of {', '.join(map(repr, VERBOSE))}. Got {verbose!r}.")
    file = sys.stdout if file is None else file
    file = getattr(file, "rich_proxied_file", file)  # standard output, seen from within a bar
    if verbose in (0, "none") or file is None:
        return _Nothing()
    if verbose == 2:
        return _Lines(file, transient, interval=math.inf)
    if verbose == "bar" or (verbose != "line" and (_is_terminal(file) or _is_notebook(file))):
        return _Bar(file, transient)
    return _Lines(file, transient)


def _encodable(line, file):
    """The line in characters that the file's encoding has."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return line.translate(ASCII).encode(encoding, "replace").decode(encoding)
    return line


def _is_terminal(file):
    isatty = getattr(file, "isatty", None)
    return bool(isatty and isatty()) and os.environ.get("TERM") not in ("dumb", "unknown")


def _is_notebook(file):
    if file is not sys.stdout or "IPython" not in sys.modules:
        return False
    try:
        import ipywidgets  # noqa: F401 (rich draws with it)
    except ImportError:
        return False
    from rich.console import Console

    return Console().is_jupyter
