"""What is not finite is named; what is out of proportion is told from noise."""

import json
import math

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfloop.runs.guard import Skipped, SpikeRule, first_nonfinite, threshold


def test_the_first_bad_tensor_in_order_is_named():
    tensors = {
        "x": np.ones(3, "f"),
        "labels": np.array([1, 2]),
        "h": np.array([[1.0, np.inf], [np.nan, -np.inf]], "f"),
        "loss": np.array(np.nan),
    }
    report = first_nonfinite(tensors)
    assert (report.name, report.nan, report.positive, report.negative) == ("h", 1, 1, 1)
    assert (report.at, report.finite_before) == ((0, 1), "x")
    assert str(report) == (
        "'h' (float32[2, 2]) is the first tensor that is not finite: 1 NaN, 1 inf, 1 -inf of 4 values, "
        "the first at [0, 1]; 'x' before it is finite."
    )


def test_a_step_that_is_finite_has_no_report():
    assert first_nonfinite([("x", np.ones(2)), ("n", np.array([1])), ("s", np.array(["a"]))]) is None
    assert first_nonfinite({}) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_of_keras_in_any_precision_are_understood(dtype):
    report = first_nonfinite({"z": keras.ops.convert_to_tensor([1.0, math.nan], dtype)})
    assert (report.dtype, report.at) == (dtype, (1,))
    assert first_nonfinite({"z": np.array(3e38, ml_dtypes.bfloat16)}) is None


def test_a_scalar_is_reported_too():
    assert "of 1 values, the first at []" in str(first_nonfinite({"loss": np.float32(np.inf)}))


# Spikes


def test_the_threshold_of_normal_numbers_is_that_many_standard_deviations():
    values = np.random.default_rng(0).normal(5.0, 2.0, 100_000)
    assert threshold(values, 6.0) == pytest.approx(5 + 6 * 2, rel=0.02)


def test_the_threshold_stands_half_of_the_numbers_being_wrong():
    values = [*np.linspace(1, 2, 51), *[1e6] * 49]
    assert threshold(values, 6.0) < 20


def losses(count, seed=0):
    rng = np.random.default_rng(seed)
    return 2.0 * 0.995 ** np.arange(count) * rng.lognormal(0, 0.1, count)


def test_a_loss_a_hundred_times_too_large_is_a_spike_and_ordinary_ones_are_not():
    for seed in range(5):
        rule = SpikeRule()
        values = losses(600, seed)
        values[400] *= 100
        spikes = [step for step, loss in enumerate(values) if rule.update(loss)]
        assert spikes == [400]


def test_a_new_level_is_accepted_after_a_while():
    rule = SpikeRule(patience=4, warmup=8)
    for _ in range(20):
        assert not rule.update(1.0)
    assert [rule.update(50.0) for _ in range(6)] == [True, True, True, False, False, False]


def test_nothing_is_a_spike_before_enough_is_known_and_nan_never_is():
    rule = SpikeRule(warmup=4)
    assert not any(rule.update(x) for x in [1.0, 100.0, 1.0, 1e9])
    assert not rule.update(math.nan) and not rule.update(math.inf)
    assert rule.get_state()["window"] == [1.0, 100.0, 1.0, 1e9]


@settings(max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6), min_size=20, max_size=60), st.integers(0, 59))
def test_a_rule_goes_on_from_its_state_as_if_never_stopped(values, at):
    rule = SpikeRule(warmup=4, window=16, patience=3)
    straight = [rule.update(v) for v in values]
    first, second = SpikeRule(warmup=4, window=16, patience=3), SpikeRule(warmup=4, window=16, patience=3)
    resumed = [first.update(v) for v in values[:at]]
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert resumed + [second.update(v) for v in values[at:]] == straight


@pytest.mark.parametrize("kwargs", [{"factor": 0}, {"warmup": 1}, {"warmup": 200}, {"patience": 0}])
def test_a_rule_that_makes_no_sense_is_refused(kwargs):
    with pytest.raises(ValueError, match="SpikeRule needs"):
        SpikeRule(**kwargs)


# Skipped batches


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(1, 5)), max_size=8))
def test_skipped_ranges_hold_exactly_what_was_added(added):
    skipped = Skipped()
    for epoch, start, length in added:
        skipped.add(epoch, start, start + length)
    expected = {(e, start + i) for e, start, length in added for i in range(length)}
    again = Skipped(json.loads(json.dumps(skipped.get_state())))
    everything = [(e, i) for e in range(3) for i in range(30)]
    assert {batch for batch in everything if batch in again} == expected
    assert again.ranges == sorted(again.ranges)


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="start < stop"):
        Skipped().add(0, 3, 3)
