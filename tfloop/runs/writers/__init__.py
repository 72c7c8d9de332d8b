"""Where the numbers of a run go: one interface, a file a format, and two wrappers."""

from tfloop.runs.writers.csv_file import CSV
from tfloop.runs.writers.curves import Curves
from tfloop.runs.writers.jsonl import JSONL
from tfloop.runs.writers.tensorboard import TensorBoard
from tfloop.runs.writers.threaded import Threaded
from tfloop.runs.writers.writer import Composite, Writer

__all__ = ["CSV", "JSONL", "Composite", "Curves", "TensorBoard", "Threaded", "Writer"]
