"""A function as a parametrisation."""

import keras

from tfloop.weights.parametrization import Parametrization, snake_case


@keras.saving.register_keras_serializable("tfloop")
class Function(Parametrization):
    """W = fn(raw).

    Args:
        fn: a function of one tensor (float32, or float64 if the variable is) that gives a tensor of the same
            shape, from TensorFlow or `keras.ops` operations. A file can restore it if it was registered with
            `keras.saving.register_keras_serializable`; else `get_config` raises `ValueError`.

    ```python
    layer = tfloop.Parametrized(layers.Dense(2), {"kernel": tfloop.Function(ops.tanh)})
    layer.build((None, 3))
    effective = layer.effective_weights()["kernel"]
    np.testing.assert_allclose(effective, np.tanh(layer.layer.kernel), rtol=1e-5)
    ```
    """

    def __init__(self, fn):
        super().__init__()
        if not callable(fn):
            raise TypeError(f"Function({fn!r}): a function of one tensor is needed.")
        self.fn = fn

    def call(self, raw, training=False):
        return self.fn(raw)

    def fresh(self):
        return self._make()

    @property
    def kind(self):
        name = getattr(self.fn, "__name__", "function")
        return snake_case(name) if name.isidentifier() else "function"

    def get_config(self):
        registered = keras.saving.get_registered_object(keras.saving.get_registered_name(self.fn))
        if registered is not self.fn:
            raise ValueError(
                f"Function({self.fn!r}) cannot be written to a file: decorate the function with "
                '@keras.saving.register_keras_serializable("my_project").'
            )
        return {"fn": keras.saving.serialize_keras_object(self.fn)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["fn"]))
