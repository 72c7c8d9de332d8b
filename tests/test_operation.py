import numpy as np
import pytest
import tensorflow as tf

from tfloop import operation
from tfloop.operation import Operation


def test_an_operation_gives_what_its_function_gives():
    variables = [tf.Variable([1.0, 2.0]), tf.Variable(3, dtype=tf.int64), tf.Variable(True), tf.Variable("a")]
    function = tf.function(lambda x, pair: [*variables, x + 1, pair["a"] * pair["b"]], autograph=False)
    args = tf.constant([[1.0]]), {"b": tf.constant(2), "a": tf.constant(3)}
    concrete = function.get_concrete_function(*args)
    found, expected = Operation(concrete)(*args), concrete(*args)
    assert [repr(t) for t in found] == [repr(t) for t in expected]


def test_an_operation_takes_ragged_and_sparse_tensors_apart():
    ragged, sparse = tf.ragged.constant([[1, 2], [], [3]]), tf.sparse.from_dense([[0, 5], [7, 0]])
    function = tf.function(lambda r, s: (tf.reduce_sum(r, 1), tf.sparse.to_dense(s)), autograph=False)
    sums, dense = Operation(function.get_concrete_function(ragged, sparse))(ragged, sparse)
    assert sums.numpy().tolist() == [3, 0, 3] and dense.numpy().tolist() == [[0, 5], [7, 0]]


def test_an_operation_sees_and_changes_variables_as_they_are_when_it_is_called():
    v = tf.Variable(1.0)
    add = Operation(tf.function(lambda x: v.assign_add(x), autograph=False).get_concrete_function(tf.constant(0.0)))
    v.assign(10.0)
    assert [float(add(tf.constant(2.0))[0]) for _ in range(2)] == [12.0, 14.0] and v.numpy() == 14.0


def test_an_error_in_an_operation_has_its_class():
    @tf.function(autograph=False)
    def positive(x):
        tf.debugging.assert_positive(x, "not this")
        return x

    with pytest.raises(tf.errors.InvalidArgumentError, match="not this"):
        Operation(positive.get_concrete_function(tf.constant(1)))(tf.constant(-1))


def test_a_compiled_function_is_refused_and_one_that_calls_it_is_compiled():
    def body(x):
        return tf.strings.length(tf.strings.as_string(x))  # XLA has no strings

    x = tf.constant(2.0)
    compiled = tf.function(body, autograph=False, jit_compile=True)
    with pytest.raises(ValueError, match="a function that calls it"):
        Operation(tf.function(lambda x: 2 * x, jit_compile=True).get_concrete_function(x))
    outer = Operation(tf.function(lambda x: compiled(x), autograph=False).get_concrete_function(x))
    with pytest.raises(tf.errors.InvalidArgumentError, match="unsupported operations"):
        outer(x)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int64"])
def test_assign(dtype):
    variable = tf.Variable(0, dtype=dtype)
    operation.assign(variable, 3)
    assert variable.dtype == dtype and np.asarray(variable.numpy(), float) == 3
