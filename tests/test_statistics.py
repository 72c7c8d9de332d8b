"""Statistics against NumPy, over shapes and dtypes, eagerly and compiled; the registry's errors."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tfloop
from tfloop import statistics

ORACLES = {
    "mean": np.mean,
    "rms": lambda a: np.sqrt(np.mean(a**2)),
    "norm": lambda a: np.sqrt(np.sum(a**2)),
    "min": np.min,
    "max": np.max,
    "std": np.std,
    "abs_mean": lambda a: np.mean(np.abs(a)),
    "zeros": lambda a: np.mean(a == 0),
    "nonfinite": lambda a: np.mean(~np.isfinite(a)),
}
# TensorFlow's threads take a subnormal number for zero, and its main thread does not.
arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=4),
    elements=st.one_of(st.just(0.0), st.floats(-100, 100, width=32, allow_subnormal=False)),
)


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=20, deadline=None)
@given(array=arrays)
def test_a_statistic_is_what_numpy_says(name, array):
    value = statistics.get_statistic(name)(tf.constant(array))
    np.testing.assert_allclose(value, ORACLES[name](array.astype("float64")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*ORACLES, "histogram"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "bool"])
def test_other_dtypes_are_measured_in_float32(name, dtype):
    tensor = tf.cast(tf.constant([[0, 1], [3, 4]]), dtype)
    assert statistics.get_statistic(name)(tensor).dtype == tf.float32


@pytest.mark.parametrize("name", [*ORACLES, "histogram"])
def test_compiled_as_eagerly(name):
    statistic = statistics.get_statistic(name)
    tensor = tf.constant(np.random.default_rng(0).normal(size=(5, 7)), tf.float32)
    np.testing.assert_allclose(tf.function(statistic, jit_compile=True)(tensor), statistic(tensor), rtol=1e-5)


@pytest.mark.parametrize("array", [[1.0, np.nan, 3.0], [np.nan, np.nan]])
@pytest.mark.parametrize("name", sorted(ORACLES.keys() - {"zeros", "nonfinite"}))
def test_xla_too_says_nan_where_an_element_is(name, array):
    compiled = tf.function(statistics.get_statistic(name), jit_compile=True)
    assert np.isnan(compiled(tf.constant(array)))


@pytest.mark.parametrize("aggregation", ["min", "max"])
def test_an_extreme_of_values_with_a_nan_is_nan_under_xla(aggregation):
    model = tfloop.Model(x := keras.Input((2,)), keras.layers.Dense(1)(x))
    model.add_metric(lambda t: t["x"], name="extreme", aggregation=aggregation)
    model.compile("sgd", "mse", jit_compile=True)
    data = np.float32([[1, 2], [np.nan, 3], [4, 5]])
    assert np.isnan(model.fit(data, data[:, :1], batch_size=1, verbose=0).history["extreme"][0])
    metric = next(m for m in model.metrics if m.name == "extreme")
    metric.reset_state()
    tf.function(metric.accumulate, jit_compile=True)(tf.constant(data))
    assert np.isnan(metric.result())


def test_nonfinite_counts_nan_and_infinity():
    value = statistics.get_statistic("nonfinite")(tf.constant([1.0, np.nan, np.inf, -np.inf]))
    assert float(value) == 0.75


@settings(max_examples=20, deadline=None)
@given(array=arrays)
def test_a_histogram_counts_every_element_once(array):
    counts = statistics.get_statistic("histogram")(tf.constant(array)).numpy()
    edges = np.concatenate([[-np.inf], statistics.HISTOGRAM_EDGES, [np.inf]])
    expected = [np.sum((array >= low) & (array < high)) for low, high in itertools.pairwise(edges)]
    np.testing.assert_array_equal(counts, expected)


def test_register_and_use_one():
    @tfloop.register_statistic(name="second_moment", aggregation="max")
    def second(tensor):
        return tf.reduce_mean(tensor**2)

    found = statistics.get_statistic("second_moment")
    assert found.aggregation == "max"
    assert float(found(tf.constant([1.0, 3.0]))) == 5.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "rms"}, "already"),
        ({"name": "a/b"}, "identifier"),
        ({}, "needs a name"),
        ({"name": "fine", "aggregation": "median"}, "'mean', 'sum'"),
    ],
)
def test_a_bad_registration_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tfloop.register_statistic(lambda t: t, **arguments)


def test_an_unknown_statistic_lists_what_there_is():
    with pytest.raises(ValueError, match="'mean', 'rms', 'norm'"):
        statistics.get_statistic("median")


def test_of_a_ragged_tensor_the_elements_count_and_of_a_sparse_one_its_zeros_too():
    rms, zeros = statistics.get_statistic("rms"), statistics.get_statistic("zeros")
    ragged = tf.ragged.constant([[3.0], [], [0.0, 4.0]])
    np.testing.assert_allclose(rms(ragged), np.sqrt(25 / 3), rtol=1e-6)
    dense = np.array([[0, 3, 0], [4, 0, 0]], "float32")
    np.testing.assert_allclose(rms(tf.sparse.from_dense(dense)), np.sqrt(25 / 6), rtol=1e-6)
    np.testing.assert_allclose(zeros(tf.sparse.from_dense(dense)), 4 / 6, rtol=1e-6)
