"""What TensorFlow does eagerly, with less Python in between.

Calling a `tf.function`, or its concrete function, binds arguments, looks for tapes and packs results in Python. That
takes some 0.3 ms, as long as a small step: too much where a chunk is one step long, or 20 variables are to be read.
"""

import tensorflow as tf


class Operation:
    """A concrete function, to be called eagerly. Gives the flat list of its tensors; no gradient passes through.

        read = Operation(tf.function(lambda: [tf.identity(v) for v in variables]).get_concrete_function())
        values = read()

    Raises `ValueError` for a function with `jit_compile=True`, which TensorFlow would run without XLA here. One that
    calls it is right: `Operation(tf.function(lambda *args: compiled(*args)).get_concrete_function(...))`.
    """

    def __init__(self, function):
        if function.function_def.attr["_XlaMustCompile"].b:
            raise ValueError(f"{function.name} has jit_compile=True. Expected a function that calls it.")
        self._function = function
        self._dtypes = [tensor.dtype for tensor in function.outputs]
        self._one_device = len(tf.config.list_logical_devices()) == 1

    def __call__(self, *args):
        if not self._one_device:  # TensorFlow places all of an operation on one; a function may use several
            return tf.nest.flatten(self._function(*args), expand_composites=True)
        tensors = tf.nest.flatten(args, expand_composites=True)
        tensors += self._function.captured_inputs
        return tf.raw_ops.StatefulPartitionedCall(args=tensors, Tout=self._dtypes, f=self._function)


def assign(variable, number):
    """Assigns a number to a `tf.Variable` that no strategy distributes; `Variable.assign` takes ten times as long."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=tf.constant(number, variable.dtype))
