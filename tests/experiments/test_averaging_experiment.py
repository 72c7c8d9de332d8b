"""The averaging experiment: what it measures, and the fault and the mend that it shows."""

import json
import subprocess
import sys

import numpy as np
import pytest

import tfloop
from experiments.averaging.data import noisy
from experiments.averaging.judge import Judge
from experiments.averaging.model import build


def test_judge_measures_from_the_first_snapshot_and_leaves_the_model_alone():
    (x, y), test = noisy()
    x, y = x[:64], y[:64]
    model = build(x.shape[1:], width=2)
    model.compile("sgd", "sparse_categorical_crossentropy")
    average = tfloop.WeightAverage(start=3)
    judge = Judge(average, (x, y), test)
    model.fit(x, y, batch_size=32, epochs=3, verbose=0, callbacks=[average, judge])
    assert judge.epochs == [2, 3] and all(len(c) == 2 for c in judge.curves.values())
    assert int(average.count) == 4

    before = tfloop.fingerprint(model)
    judge.on_epoch_end(3)
    assert tfloop.fingerprint(model) == before
    again = Judge(average, (x, y), test)
    again.set_state(judge.get_state())
    assert again.curves == judge.curves


def test_noise_is_the_same_every_time():
    for a, b in zip(noisy(), noisy(), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def run(folder, *arguments):
    command = [sys.executable, "-m", "experiments.averaging", f"--workdir={folder}", "--progress=none", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads((folder / "accuracy.json").read_text())


def test_a_short_run_writes_its_results(tmp_path):
    run(tmp_path, "--epochs=1", "--start=1", "--kind=ema")
    assert (tmp_path / "accuracy.png").exists()


@pytest.mark.slow
def test_old_statistics_spoil_the_average_and_its_own_mend_it(tmp_path):
    accuracy = run(tmp_path)
    assert accuracy["old_statistics"] < accuracy["last"] - 0.1
    assert accuracy["own_statistics"] > accuracy["last"]
    assert accuracy["own_statistics"] > 0.85
