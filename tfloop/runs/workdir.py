"""The run folder: proved to be usable, locked while in use, and all that a run touches.

    config.json  metrics.jsonl  tensorboard/  checkpoints/  curves.png  summary.json

Everything is named relative to the folder, so that it can be moved. What is here is data: nothing in
it is run, and no flag is read back from it, only compared.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import tempfile
from pathlib import Path

from tfloop.runs import files
from tfloop.runs.errors import FolderError, LockedError

LOCK = ".lock"
CONFIG = "config.json"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
PREVIOUS = "previous-"
RESUME = ("auto", "never", "restart", "partial")


class Workdir:
    """A run folder in use: probed, locked, and read or begun anew as `resume` says.

    `resume`: `"auto"` and `"partial"` go on with what is there, `"never"` refuses a used folder,
    `"restart"` moves what is there to `previous-<n>/`. `FolderError` or `LockedError` if it cannot
    be used, before anything in it is changed.

        with Workdir("runs/classifier/1") as workdir:
            workdir.write_json("summary.json", {"steps": 10})
    """

    def __init__(self, path, resume="auto"):
        if resume not in RESUME:
            raise ValueError(f"resume must be one of {', '.join(RESUME)}, got {resume!r}.")
        self.folder = Path(path).absolute()
        self._lock: Lock | None = None
        probe(self.folder)
        self._lock = Lock(self.folder / LOCK)
        try:
            _finish_moving(self.folder)
            if resume == "never" and self.used:
                raise FolderError(
                    f"{self.folder} holds a run, and --resume=never does not go on with one. "
                    "Choose another --workdir, or --resume=auto."
                )
            if resume == "restart":
                self._move_away()
        except BaseException:
            self.close()
            raise

    @property
    def used(self):
        """Whether the folder holds a run: its configuration, logs or checkpoints."""
        names = (CONFIG, METRICS, CHECKPOINTS, SUMMARY)
        return any(files.exists(self.folder / name) for name in names)

    def path(self, name):
        """A path in the folder; `FolderError` if it would leave it."""
        return place_in(self.folder, name)

    def make_folder(self, name):
        """A folder in the run folder, made if it is not there."""
        place = self.path(name)
        files.make_folder(place)
        return place

    def write_json(self, name, value):
        """Writes a JSON file, whole or not at all. What is not finite is `null`."""
        text = json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"
        files.write_whole(self.path(name), text.encode())

    def read_json(self, name):
        """What a JSON file of the folder holds; `None` if there is none; `FolderError` if it is garbled."""
        return read_json(self.folder, name)

    def _move_away(self):
        """Moves what is there to `previous-<n>/`. A kill in between is made good at the next start."""
        names = _movable(self.folder)
        if not names:
            return
        if not self.used:
            raise FolderError(
                f"{self.folder} holds files and no run: {', '.join(sorted(names)[:5])}. "
                "--resume=restart would move them; choose another --workdir."
            )
        aside = self.folder / f".{PREVIOUS}{_next_number(self.folder, PREVIOUS)}"
        aside.mkdir()
        _finish_moving(self.folder)

    def abandon(self):
        """Gives the folder back, and removes it if it holds nothing."""
        if os.listdir(self.folder) == [LOCK]:
            self.path(LOCK).unlink()
            self.folder.rmdir()
        self.close()

    def close(self):
        """Gives the folder back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class Aside(Workdir):
    """What a process has that trains along in another's run: a folder of its own, which ends with the process."""

    def __init__(self):
        self._temporary = tempfile.TemporaryDirectory(prefix="tfloop-")
        super().__init__(self._temporary.name)


def place_in(folder, name):
    """A path in a folder; `FolderError` if it would leave it."""
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or not parts:
        raise FolderError(f"{name!r} is not in the run folder {folder}.")
    place = folder
    for part in parts:
        place = place / part
        if place.is_symlink():
            raise FolderError(f"{place} is a link; a run touches nothing outside of its folder.")
    return place


def read_json(folder, name):
    """What a JSON file of a run folder holds; `None` if there is none; `FolderError` if it is garbled."""
    try:
        with files.open_regular(place_in(folder, name)) as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FolderError(f"{folder / name} cannot be read: {error}") from error


def numbered(runs, experiment):
    """Makes and returns the next `runs/<experiment>/<n>`, from 1 on."""
    folder = Path(runs) / experiment
    with _told(folder):
        files.make_folder(folder)
        while True:
            place = folder / str(_next_number(folder, ""))
            with contextlib.suppress(FileExistsError):  # somebody else took the number
                place.mkdir()
                files.flush_folder(folder)
                return place


def probe(folder):
    """Makes the folder if need be, and writes, flushes, renames and removes a small file in it.

    `FolderError` if one of them fails: better before the model is built than at the first save.
    """
    folder = Path(folder)
    name = f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    with _told(folder):
        files.make_folder(folder)
        try:
            files.write_whole(folder / name, b"probe")
        finally:
            for left in (folder / name, folder / f".{name}.aside"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(left)


@contextlib.contextmanager
def _told(folder):
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        raise FolderError(f"{folder} cannot be used as a run folder: {what}.") from error


def _next_number(folder, prefix):
    taken = [name.lstrip(".").removeprefix(prefix) for name in os.listdir(folder) if prefix in name]
    return max((int(number) for number in taken if number.isdecimal()), default=0) + 1


def _movable(folder):
    kept = (LOCK, PREVIOUS, f".{PREVIOUS}")
    return [name for name in os.listdir(folder) if not name.startswith(kept)]


def _finish_moving(folder):
    """Completes a move to `.previous-<n>/` that was begun, and names it `previous-<n>`."""
    for name in os.listdir(folder):
        aside = folder / name
        if name.startswith(f".{PREVIOUS}") and files.is_folder(aside):
            for item in _movable(folder):
                os.rename(folder / item, aside / item)
            files.flush_folder(aside)
            os.rename(aside, folder / name.removeprefix("."))
            files.flush_folder(folder)


def _finite(value):
    """`value` with `None` for every float that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    value = files.plain(value)
    if isinstance(value, float) and value - value != 0.0:  # infinite or NaN
        return None
    return value


class Lock:
    """A lock on a file, held as long as the process lives.

    The kernel's lock (`flock`) decides among the processes of one machine, and is gone with its
    holder. The file says who holds it: pid, host and boot id. Where the file system does not pass
    locks on between machines, another machine's name in it is believed.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _take(self):
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LockedError(_refusal(self.path, self._holder())) from None
            locks = False  # a file system without locks: only the file's word counts
        holder = self._holder()
        if holder and not _is_over(holder, locks):
            raise LockedError(_refusal(self.path, holder))
        self._write(json.dumps(_me()).encode())

    def _holder(self):
        """Who wrote the lock file; empty if nobody holds it, or a kill left it half written."""
        try:
            holder = json.loads(os.pread(self._descriptor, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _write(self, data):
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        os.fsync(self._descriptor)

    def release(self):
        """Gives the lock back. The empty file stays: removing it would race with who comes next."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def _me():
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "started": _started(os.getpid())}


def _boot():
    """What tells one start of one machine's kernel from any other; `None` if it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _started(pid):
    """When a process started, in ticks since boot, which tells it from a later one of the same pid."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_over(holder, locks):
    """Whether the run that wrote a lock file is surely over. `locks`: the kernel's lock is ours now."""
    if holder.get("boot") is not None and holder.get("boot") == _boot():
        # The same kernel: it would have kept the lock for a live holder. A copied folder ends here.
        return locks or _started(holder.get("pid")) != holder.get("started")
    return holder.get("host") == socket.gethostname()  # the same machine, started again since


def _refusal(path, holder):
    who = f"pid {holder['pid']} on {holder.get('host')}" if "pid" in holder else "another process"
    return (
        f"{path.parent} is in use by {who}. Wait for that run, stop it, or choose another --workdir"
        f" (if it is surely over, remove {path})."
    )
