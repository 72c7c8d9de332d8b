"""Processes that train one model together, and share the folder of its run."""

import json
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from nursery import Nursery
from safetensors.numpy import load_file

SCRIPT = Path(__file__).parent / "plain.py"
STEPS = 30


@pytest.fixture(scope="module")
def nurseries():
    found = [Nursery(SCRIPT) for _ in range(2)]
    yield found
    for nursery in found:
        nursery.close()


@pytest.fixture(scope="module")
def reference(nurseries, tmp_path_factory):
    """The folder of a run of two workers that nothing happened to."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    ended = together(nurseries, folder)
    assert [status for status, _ in ended] == [0, 0], ended
    return folder


def together(nurseries, folder, *flags, of=(0, 1), **arguments):
    """Runs two workers to their end: `[(status, output)]`. `signals` and `after` are for the last of them."""
    ports = [free_port() for _ in nurseries]
    workers = [f"127.0.0.1:{port}" for port in ports]
    ended = [None, None]

    def run(index):
        task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        given = dict(arguments)
        if index == 0:
            given.pop("signals", None)
            given.pop("after", None)
        out = folder.with_suffix(f".{index}.out")
        environment = {"TF_CONFIG": json.dumps(task)}
        ended[index] = nurseries[index].run(
            folder, "--strategy=multiworker", *flags, environment=environment, out=out, **given
        )

    threads = [threading.Thread(target=run, args=(index,)) for index in of]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def rows(folder):
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if '"train"' in line and line.endswith("}")]


def has_rows(count):
    return lambda folder: len(rows(folder)) >= count


def newest(folder):
    """The tensors of the newest checkpoint."""
    place = max((folder / "checkpoints").glob("step-*"))
    return load_file(next(place.glob("*.safetensors")))


def assert_close(one, other, tolerance=1e-6):
    one, other = ({n: v for n, v in given.items() if not n.startswith("process/")} for given in (one, other))
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)


def assert_same(folder, reference):
    assert summary(folder)["fingerprint"] == summary(reference)["fingerprint"]
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))


def fingerprint(said):
    return next(line for line in said.splitlines() if line.startswith("fingerprint"))


def test_two_workers_train_what_one_process_does(nurseries, reference, tmp_path):
    folder = tmp_path / "run"
    status, said = nurseries[0].run(folder, "--jit=off")
    assert status == 0, said
    assert_close(newest(folder), newest(reference))
    for one, two in zip(rows(folder), rows(reference), strict=True):
        assert one.pop("split") == two.pop("split")
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6)
    assert summary(reference)["metrics"] == pytest.approx(summary(folder)["metrics"], rel=1e-5)


def test_both_end_with_the_same_bytes_and_the_chief_writes(nurseries, tmp_path):
    folder = tmp_path / "run"
    first, second = together(nurseries, folder)
    assert first[0] == second[0] == 0, (first, second)
    assert fingerprint(first[1]) == fingerprint(second[1])
    assert summary(folder)["fingerprint"] in first[1]
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))


def test_a_finished_run_says_so_to_both(nurseries, reference, tmp_path):
    before = (reference / "metrics.jsonl").read_bytes()
    ended = together(nurseries, reference)
    assert [status for status, _ in ended] == [0, 0], ended
    assert "is finished: 30 steps are done" in ended[0][1]
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_sigterm_to_one_ends_both_after_a_save(nurseries, reference, tmp_path):
    folder = tmp_path / "run"
    ended = together(nurseries, folder, pause=0.3, signals=[(0.1, signal.SIGTERM)], after=has_rows(6))
    assert [status for status, _ in ended] == [143, 143], ended
    assert rows(folder)[-1]["step"] < STEPS
    ended = together(nurseries, folder)
    assert [status for status, _ in ended] == [0, 0], ended
    assert_same(folder, reference)


def test_a_worker_that_is_killed_ends_the_other_and_the_run_goes_on_exactly(nurseries, reference, tmp_path):
    folder = tmp_path / "run"
    began = time.monotonic()
    ended = together(nurseries, folder, pause=0.3, signals=[(0.1, signal.SIGKILL)], after=has_rows(6))
    assert ended[1][0] == -signal.SIGKILL and ended[0][0] == 1, ended
    assert "Another process of this run" in ended[0][1]
    assert time.monotonic() - began < 60
    ended = together(nurseries, folder)
    assert [status for status, _ in ended] == [0, 0], ended
    assert_same(folder, reference)


def test_an_error_in_one_ends_both(nurseries, reference, tmp_path):
    folder = tmp_path / "run"
    ended = together(nurseries, folder, fail=1)
    assert ended[1][0] == 1 and "this worker failed" in ended[1][1]
    assert ended[0][0] == 1 and "Another process of this run" in ended[0][1], ended[0][1]
    assert [status for status, _ in together(nurseries, folder)] == [0, 0]
    assert_same(folder, reference)


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_other(nurseries, reference, tmp_path):
    folder = tmp_path / "run"
    stopped = [(0.1, signal.SIGSTOP), (30, signal.SIGKILL)]
    began = time.monotonic()
    ended = together(nurseries, folder, pause=0.3, signals=stopped, after=has_rows(6))
    assert ended[0][0] == 1 and "Another process of this run" in ended[0][1], ended[0][1]
    assert time.monotonic() - began < 90
    assert [status for status, _ in together(nurseries, folder)] == [0, 0]
    assert_same(folder, reference)


def test_another_number_of_replicas_goes_on_with_the_same_samples(nurseries, reference, tmp_path):
    """Two workers, then one device, then two devices of one process."""
    folder = tmp_path / "run"
    assert [status for status, _ in together(nurseries, folder, "--epochs=2")] == [0, 0]
    status, said = nurseries[0].run(folder, "--epochs=4")
    assert status == 0, said
    status, said = nurseries[0].run(folder, "--epochs=6", "--strategy=mirrored", devices=2)
    assert status == 0, said
    assert_close(newest(folder), newest(reference), 1e-5)


def test_what_is_missing_is_said_at_once(nurseries, tmp_path):
    status, said = nurseries[0].run(tmp_path / "run", "--strategy=multiworker", environment={"TF_CONFIG": ""})
    assert status == 2 and "TF_CONFIG" in said
    assert not (tmp_path / "run").exists()


def test_xla_is_refused_on_replicas(nurseries, tmp_path):
    status, said = nurseries[0].run(tmp_path / "run", "--strategy=mirrored", "--jit=step")
    assert status == 2 and "--jit=step: with --strategy=mirrored steps run as a graph" in said
    assert not (tmp_path / "run").exists()
