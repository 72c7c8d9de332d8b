"""The run folder: probed, locked, moved; and what may differ when a run goes on."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from saver import without_tensorflow

from tfloop.runs import config, files, workdir
from tfloop.runs.errors import FolderError, LockedError, Refused
from tfloop.runs.workdir import Lock, Workdir, numbered, probe

HOLDER = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from saver import without_tensorflow
without_tensorflow()
from tfloop.runs.workdir import Workdir
held = Workdir(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another live process that uses the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# Probing


@pytest.mark.parametrize("path", ["/proc/run", "/dev/null/run", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(path):
    with pytest.raises(FolderError, match="cannot be used as a run folder") as caught:
        Workdir(path)
    assert caught.value.exit_status == 2 and "\n" not in str(caught.value)


def test_a_read_only_file_system_is_refused(tmp_path):
    code = HOLDER.replace("held = Workdir(sys.argv[1])", "Workdir(sys.argv[1])")
    (tmp_path / "code.py").write_text(code)
    target = tmp_path / "run"
    target.mkdir()
    script = f"mount -t tmpfs -o ro tmpfs {target} && {sys.executable} {tmp_path}/code.py {target}"
    command = ["unshare", "--mount", "sh", "-c", script]
    if not shutil.which("unshare") or subprocess.run([*command[:2], "true"], capture_output=True).returncode:
        pytest.skip("mounting takes root")
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "FolderError" in result.stderr and "Read-only file system" in result.stderr


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_probe_writes_flushes_and_renames_and_leaves_nothing(tmp_path, monkeypatch, step):
    probe(tmp_path)
    assert os.listdir(tmp_path) == []

    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, step, fails)
    with pytest.raises(FolderError, match="Input/output error"):
        probe(tmp_path)
    assert os.listdir(tmp_path) == []


# Locking


def test_a_second_live_run_is_refused_with_pid_and_host(tmp_path, holder):
    with pytest.raises(LockedError, match=f"pid {holder.pid} on {socket.gethostname()}"):
        Workdir(tmp_path)


def test_the_lock_of_a_killed_run_is_recovered(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid
    with Workdir(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_folder_is_free_again_when_closed(tmp_path):
    with Workdir(tmp_path), pytest.raises(LockedError, match=str(os.getpid())):
        Workdir(tmp_path)
    Workdir(tmp_path).close()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_copy_of_a_folder_in_use_is_free(tmp_path, holder):
    copy = tmp_path.with_name(tmp_path.name + "-copy")
    shutil.copytree(tmp_path, copy)
    Workdir(copy).close()


@pytest.mark.parametrize(
    "change, free",
    [
        ({}, True),  # the kernel's lock is ours, so this holder is gone
        ({"boot": "before"}, True),  # this host, started again since
        ({"boot": "elsewhere", "host": "other"}, False),  # a live run on another host, for all we know
    ],
)
def test_what_a_lock_file_says_is_believed_where_the_kernel_cannot_know(tmp_path, change, free):
    (tmp_path / ".lock").write_text(json.dumps(workdir._me() | change))
    if free:
        Workdir(tmp_path).close()
    else:
        with pytest.raises(LockedError, match=r"on other.*remove .*\.lock"):
            Workdir(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\0"])
def test_a_garbled_lock_file_locks_nothing(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    Workdir(tmp_path).close()


def test_without_kernel_locks_a_reused_pid_is_told_by_its_start(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", unsupported)
    (tmp_path / ".lock").write_text(json.dumps(workdir._me() | {"started": "1"}))
    Lock(tmp_path / ".lock").release()
    (tmp_path / ".lock").write_text(json.dumps(workdir._me()))
    with pytest.raises(LockedError):
        Lock(tmp_path / ".lock")


# Going on, refusing, beginning anew


def used(folder):
    with Workdir(folder) as run:
        run.write_json("config.json", {"seed": 1})
        run.make_folder("checkpoints")
        (run.path("checkpoints") / "x").write_text("x")
    return contents(folder)


def test_auto_goes_on_and_never_refuses(tmp_path):
    before = used(tmp_path)
    with Workdir(tmp_path) as run:
        assert run.used
    with pytest.raises(FolderError, match="--resume=never"):
        Workdir(tmp_path, resume="never")
    assert contents(tmp_path) == before
    Workdir(tmp_path / "new", resume="never").close()


def test_restart_moves_what_is_there_to_a_numbered_folder(tmp_path):
    before = used(tmp_path)
    for number in (1, 2):
        with Workdir(tmp_path, resume="restart") as run:
            assert not run.used
        assert contents(tmp_path / f"previous-{number}") == before
        used(tmp_path)
    with Workdir(tmp_path / "new", resume="restart"):
        assert os.listdir(tmp_path / "new") == [".lock"]


@pytest.mark.parametrize("after", range(4))
def test_a_restart_that_was_killed_is_completed(tmp_path, monkeypatch, after):
    before = used(tmp_path)
    rename, count = os.rename, [after]

    def killed(source, target):
        count[0] -= 1
        if count[0] < 0:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(workdir.os, "rename", killed)
    if after < 3:
        with pytest.raises(KeyboardInterrupt):
            Workdir(tmp_path, resume="restart")
        monkeypatch.undo()
        with Workdir(tmp_path) as run:
            assert not run.used
    else:
        Workdir(tmp_path, resume="restart").close()
    assert contents(tmp_path / "previous-1") == before


def test_restart_does_not_move_what_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError, match=r"thesis\.tex"):
        Workdir(tmp_path, resume="restart")
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_that_was_moved_is_the_same_run(tmp_path):
    before = used(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    with Workdir(tmp_path / "b") as run:
        assert run.used
        assert str(tmp_path / "a") not in "".join(contents(tmp_path / "b").values())
    assert contents(tmp_path / "b") == before


def test_new_folders_are_numbered(tmp_path):
    assert [numbered(tmp_path, "vae").name for _ in range(3)] == ["1", "2", "3"]
    (tmp_path / "vae" / "10").mkdir()
    (tmp_path / "vae" / "notes").mkdir()
    assert numbered(tmp_path, "vae") == tmp_path / "vae" / "11"


def test_numbers_are_given_once_to_processes_that_start_together(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2, without_tensorflow) as pool:
        made = pool.starmap(numbered, [(tmp_path, "vae")] * 10)
    assert len(set(made)) == 10


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ""])
def test_a_path_outside_is_refused(tmp_path, name):
    with Workdir(tmp_path) as run, pytest.raises(FolderError, match="not in the run folder"):
        run.path(name)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    with Workdir(tmp_path / "run") as run:
        (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "outside")
        with pytest.raises(FolderError, match="link"):
            run.path("checkpoints/step-1")


# JSON files


def test_json_files_are_strict_and_whole(tmp_path):
    with Workdir(tmp_path) as run:
        run.write_json("summary.json", {"loss": float("nan"), "n": np.float32(0.5), "l": [float("inf")]})
        assert run.read_json("summary.json") == {"loss": None, "n": 0.5, "l": [None]}
        assert run.read_json("none.json") is None
        run.path("summary.json").write_text('{"a":')
        with pytest.raises(FolderError, match=r"summary\.json cannot be read"):
            run.read_json("summary.json")


# What may differ


BEFORE = {
    "flags": {"seed": 0, "epochs": 5, "batch_size": 128, "jit": "auto", "watch": [], "keep": 3},
    "seed": 0,
    "threads": {"intra": 2},
    "versions": {"keras": "3.15.1"},
    "engine": "scan",
    "data": {"examples": 1437},
}


def changed(**updates):
    now = json.loads(json.dumps(BEFORE))
    for path, value in updates.items():
        *above, last = path.split("__")
        place = now
        for name in above:
            place = place[name]
        place[last] = value
    return config.changes(BEFORE, now)


def test_nothing_differs_from_itself():
    assert config.changes(BEFORE, json.loads(json.dumps(BEFORE))) == ([], [], [])
    assert changed(flags__watch=()) == ([], [], [])


@pytest.mark.parametrize("flag", ["epochs", "keep", "workdir", "on_nan", "profile"])
def test_some_flags_may_differ(flag):
    refused, warned, allowed = changed(**{f"flags__{flag}": 77})
    assert (refused, warned) == ([], []) and f"flags/{flag}: " in allowed[0]


@pytest.mark.parametrize(
    "path", ["flags__seed", "flags__batch_size", "flags__jit", "flags__new", "data__examples", "seed"]
)
def test_what_changes_the_numbers_is_refused_with_the_difference(path):
    refused, warned, allowed = changed(**{path: 77})
    assert (warned, allowed) == ([], [])
    assert refused[0].startswith(path.replace("__", "/") + ": ") and refused[0].endswith("-> 77")


def test_what_may_change_the_last_bits_is_a_warning_and_the_engine_is_the_recorded_one():
    assert changed(threads__intra=4).warned == ["threads/intra: 2 -> 4"]
    assert changed(versions__keras="3.16").warned
    assert changed(engine="eager") == ([], [], [])


def test_a_flag_that_is_gone_is_a_difference():
    now = json.loads(json.dumps(BEFORE))
    del now["flags"]["seed"]
    assert config.changes(BEFORE, now).refused == ["flags/seed: 0 -> (not set)"]
    assert config.changes({"a": True}, {"a": 1}).refused


def test_what_refuses_has_the_status_of_a_refusal():
    assert issubclass(LockedError, Refused) and issubclass(FolderError, Refused)
    assert Refused.exit_status == 2
