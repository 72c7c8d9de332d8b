"""A text file that only grows, by whole lines, also when the disk is full for a while."""

import os

from absl import logging

from tfloop.runs import files

# While the disk takes nothing lines are kept in memory, up to this many bytes.
LARGEST_BACKLOG = 64 * 2**20
BLOCK = 2**16


class AppendFile:
    """Lines appended to a file. What cannot be written is kept, and tried again with what follows."""

    def __init__(self, path):
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._size = os.fstat(self._descriptor).st_size
        self._backlog: list[bytes] = []
        self._failing = False

    def append(self, data):
        """Adds whole lines (bytes). Raises `OSError` once more than `LARGEST_BACKLOG` waits."""
        self._backlog.append(data)
        try:
            self._write()
        except OSError as error:
            if not self._failing:
                self._failing = True
                logging.warning("%s cannot be written; lines are kept and tried again: %s", self.path, error)
            if sum(map(len, self._backlog)) > LARGEST_BACKLOG:
                raise

    def _write(self):
        data = memoryview(b"".join(self._backlog))
        self._backlog = [bytes(data)] if data else []
        done = 0
        try:
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
        except OSError:
            os.ftruncate(self._descriptor, self._size)  # no half line
            raise
        self._size += done
        self._backlog.clear()
        self._failing = False

    def flush(self):
        """Sends every line to the disk, or raises `OSError`."""
        self._write()
        os.fsync(self._descriptor)

    def close(self):
        """Flushes and closes."""
        try:
            self.flush()
        finally:
            os.close(self._descriptor)


def cut_after(path, keep):
    """Cuts a file after the last whole line for which `keep(line)` is true. Earlier lines all stay.

    Reads from the end, only as far as needed. Nothing happens if there is no file.
    """
    try:
        with open(path, "rb+") as file:
            file.truncate(_end_of_last(file, keep))
            files.flush_file(file)
    except FileNotFoundError:
        pass


def _end_of_last(file, keep):
    start = file.seek(0, os.SEEK_END)
    tail = b""  # from the start of a line, or of what was read of it, to the end of what is undecided
    while start:
        size = min(BLOCK, start)
        start -= size
        file.seek(start)
        tail = file.read(size) + tail
        *lines, _ = tail.split(b"\n")  # the last is half a line, or nothing
        first = 0 if start == 0 else 1  # the first may have begun before the block
        for index in range(len(lines) - 1, first - 1, -1):
            if keep(lines[index]):
                return start + sum(len(line) + 1 for line in lines[: index + 1])
        tail = b"\n".join([*lines[:first], b""]) if lines else tail
    return 0
