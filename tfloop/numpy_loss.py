"""NumPy code as a loss or a metric, with its gradient.

The function runs in Python, once a step; everything around it stays in the graph. XLA cannot compile
such a step, and the step is told so.
"""

import functools
import warnings

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfloop import finite_differences
from tfloop.step import current_step

MANY_CALLS = 1000


def numpy_loss(fn, gradient=None, per_example=None):
    """Makes a loss or a metric from NumPy code.

    `fn(*arrays)` gives a scalar, or one value an example: shape (n,) for n examples, n being the
    first axis of the first array. Half precision comes as float32, everything else as it is; the
    arrays are read-only.

    `gradient(*arrays)` gives one array an input, of its shape: the derivatives of the scalar, or
    of each example's value by its own row; `None` for an input without. Integer inputs (labels)
    have none. Without `gradient` finite differences are taken: two calls of `fn` for every element
    (of one example, where examples do not depend on each other), so give it where inputs are large.

    `per_example`: whether `fn` gives one value an example. By default `fn` is asked: it is called
    once with made-up arrays when a step is traced.

    Returns a function of tensors, for `compile(loss=...)`, as a metric, and inside `add_loss`. It is
    not differentiable twice. XLA cannot compile a step that contains it.

    Raises `ValueError` where what comes back has another shape, when the step is traced or, as an
    error of TensorFlow's, when it runs.

    ```python
    def huber(y, y_pred):
        error = np.abs(y - y_pred)
        return np.where(error < 1.0, error**2 / 2, error - 0.5).mean(axis=-1)

    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile(optimizer="sgd", loss=tfloop.numpy_loss(huber), jit_compile=False)
    model.fit(np.ones((8, 3)), np.zeros((8, 2)), verbose=0)
    ```
    """
    for name, value in {"fn": fn, "gradient": gradient}.items():
        if not callable(value) and not (name == "gradient" and value is None):
            raise TypeError(f"numpy_loss: {name}={value!r} is no function.")
    code = NumpyCode(fn, gradient, per_example)

    @functools.wraps(fn)
    def loss(*inputs):
        if any(isinstance(x, keras.KerasTensor) for x in inputs):
            return Symbolic(code)(*inputs)
        return code(*inputs)

    loss.__name__ = code.name
    return loss


class NumpyCode:
    """A NumPy function and its gradient, both checked."""

    def __init__(self, fn, gradient, per_example):
        self.fn, self.gradient, self.per_example = fn, gradient, per_example
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self.warned = False

    # -- in the graph -------------------------------------------------------------------------

    def __call__(self, *inputs):
        step = current_step()
        note = f"numpy_loss {self.name!r}"
        if step is not None and note not in step.uncompilable:
            step.uncompilable.append(note)
        tensors = [not_half(tf.convert_to_tensor(x)) for x in inputs]
        places = [i for i, x in enumerate(tensors) if x.dtype.is_floating]
        shape = None if tf.executing_eagerly() else self.output_shape(tensors)

        @tf.custom_gradient
        def compute(*floats):
            arrays = list(tensors)
            for place, value in zip(places, floats, strict=True):
                arrays[place] = value
            value = in_python(functools.partial(self.value, shape), arrays, dtype_of(tensors))
            value.set_shape(shape)

            def backward(upstream):
                if self.gradient is not None:
                    return self.given_gradients(upstream, arrays, places)
                return [self.difference(upstream, arrays, place) for place in places]

            return value, backward

        if not places:
            return in_python(functools.partial(self.value, shape), tensors, tf.float32)
        return compute(*(tensors[place] for place in places))

    def given_gradients(self, upstream, arrays, places):
        dtypes = [arrays[place].dtype for place in places]

        def run(upstream, *arrays):
            gradients = self.checked_gradients(self.gradient(*frozen(arrays)), arrays)
            return [scaled(gradients[i], upstream, arrays[i], self.name) for i in places]

        gradients = in_python(run, [upstream, *arrays], dtypes, stateful=False)
        for gradient, place in zip(gradients, places, strict=True):
            gradient.set_shape(arrays[place].shape)
        return gradients

    def difference(self, upstream, arrays, place):
        """Stateless: the gradient by an input that nobody asks for is pruned and costs nothing."""

        def run(upstream, *arrays):
            self.warn_of_many_calls(arrays, place, upstream.shape)
            call = lambda *moved: self.checked(self.fn(*frozen(moved)), moved)
            gradient = finite_differences.gradient(call, arrays, place, upstream)
            return gradient.astype(arrays[place].dtype)

        dtype = arrays[place].dtype
        gradient = in_python(run, [upstream, *arrays], dtype, stateful=False)
        gradient.set_shape(arrays[place].shape)
        return gradient

    def output_shape(self, inputs):
        """What shape the function's values have, as far as it is known when a step is traced."""
        if self.per_example is None and not self.per_example_if_asked(inputs):
            return ()
        if self.per_example is False:
            return ()
        return (next((x.shape[0] for x in inputs if x.shape.rank), None),)

    def per_example_if_asked(self, inputs):
        """Calls the function with made-up arrays. One that fails on them counts as scalar."""
        arrays = [made_up(x) for x in inputs]
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                value = self.fn(*frozen(arrays))
        except Exception:
            logging.info("numpy_loss %r fails on made-up arrays: taken for a scalar.", self.name)
            return False
        return self.checked(value, arrays).shape != ()

    # -- in Python ----------------------------------------------------------------------------

    def value(self, shape, *arrays):
        value = self.checked(self.fn(*frozen(arrays)), arrays)
        if shape is not None and len(shape) != value.ndim:
            expected = "one value an example" if shape else "a scalar"
            raise ValueError(
                f"numpy_loss {self.name!r} gave shape {value.shape} where {expected} was expected "
                f"when the step was traced. Say which: numpy_loss(fn, per_example={not shape})."
            )
        return value.astype("float64" if any(a.dtype == "float64" for a in arrays) else "float32")

    def checked(self, value, arrays):
        """`value` as an array, if it is a scalar or one value an example."""
        value = np.asarray(value)
        if not (np.issubdtype(value.dtype, np.number) or value.dtype == bool):
            raise TypeError(f"numpy_loss {self.name!r} gave {value!r}, which is no number.")
        examples = next((a.shape[:1] for a in arrays if a.ndim), ())
        if value.shape not in ((), examples):
            raise ValueError(
                f"numpy_loss {self.name!r} gave shape {value.shape} for inputs of shapes "
                f"{[a.shape for a in arrays]}. Expected a scalar or one value an example, "
                f"{examples}."
            )
        return value

    def checked_gradients(self, gradients, arrays):
        """One array an input, of its shape."""
        if not isinstance(gradients, tuple | list):
            gradients = [gradients]
        if len(gradients) != len(arrays):
            raise ValueError(
                f"numpy_loss {self.name!r}: gradient gave {len(gradients)} arrays for "
                f"{len(arrays)} inputs. Expected one an input, in order; None where there is none."
            )
        checked = []
        for i, (gradient, array) in enumerate(zip(gradients, arrays, strict=True)):
            gradient = np.zeros_like(array) if gradient is None else np.asarray(gradient)
            if gradient.shape != array.shape:
                raise ValueError(
                    f"numpy_loss {self.name!r}: gradient gave shape {gradient.shape} for input "
                    f"{i}, which has shape {array.shape}."
                )
            checked.append(gradient)
        return checked

    def warn_of_many_calls(self, arrays, place, shape):
        calls = finite_differences.calls(arrays, place, separable=shape != ())
        if calls > MANY_CALLS and not self.warned:
            self.warned = True
            logging.warning(
                "numpy_loss %r is called %d times a step or more for its finite differences. "
                "numpy_loss(fn, gradient=...) needs one call.",
                self.name,
                calls,
            )


class Symbolic(keras.Operation):
    """NumPy code on the symbolic tensors of a functional model."""

    def __init__(self, code):
        super().__init__()
        self.code = code

    def call(self, *inputs):
        return self.code(*inputs)

    def compute_output_spec(self, *inputs):
        specs = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]
        return keras.KerasTensor(self.code.output_shape(specs), dtype_of(specs).name)


def in_python(run, arrays, dtypes, stateful=True):
    """`run` on arrays: called as it is when eager, so that its errors are its own; else in the graph."""
    if not tf.executing_eagerly():
        return tf.numpy_function(run, arrays, dtypes, stateful=stateful)
    result = run(*(np.asarray(a) for a in arrays))
    if isinstance(dtypes, list):
        return [tf.convert_to_tensor(r, d) for r, d in zip(result, dtypes, strict=True)]
    return tf.convert_to_tensor(result, dtypes)


def not_half(tensor):
    is_half = tensor.dtype in (tf.float16, tf.bfloat16)
    return tf.cast(tensor, tf.float32) if is_half else tensor


def dtype_of(inputs):
    return tf.float64 if any(x.dtype == tf.float64 for x in inputs) else tf.float32


def frozen(arrays):
    """Read-only views: the memory is TensorFlow's."""
    views = [np.asarray(a).view() for a in arrays]
    for view in views:
        view.flags.writeable = False
    return views


def scaled(gradient, upstream, array, name):
    """An input's gradient times that of what comes after, row by row where there is one an example."""
    if upstream.shape and array.shape[:1] != upstream.shape:
        raise ValueError(
            f"numpy_loss {name!r} gives one value an example ({len(upstream)}), and its input of "
            f"shape {array.shape} has no row for each: leave gradient= away, or return a scalar."
        )
    factor = upstream.reshape(upstream.shape + (1,) * (array.ndim - upstream.ndim))
    return (gradient * factor).astype(array.dtype)


def made_up(tensor):
    """An array of the tensor's shape and dtype (3 where a size is not known), its floats in (0, 1)."""
    shape = tuple(3 if size is None else size for size in tensor.shape)
    size = int(np.prod(shape, dtype=int))
    if tensor.dtype.is_floating:
        return np.linspace(0.1, 0.9, size, dtype=tensor.dtype.as_numpy_dtype).reshape(shape)
    return (np.arange(size) % 2).astype(tensor.dtype.as_numpy_dtype).reshape(shape)
