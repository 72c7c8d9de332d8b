"""The private names of Keras that parametrised weights need: each fails when Keras changes it."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tfloop import _keras


def built_dense(**kwargs):
    layer = layers.Dense(3, **kwargs)
    layer.build((None, 2))
    return layer


class Asking(layers.Layer):
    """Tells what its call sees."""

    def call(self, x, training=None):
        self.seen = _keras.call_context(), _keras.call_training(), _keras.in_symbolic_scope()
        return x


def test_the_context_of_a_call_and_its_training():
    inner = Asking()
    model = keras.Sequential([keras.Input((2,)), inner])
    assert inner.seen[2]
    model(np.ones((1, 2)), training=True)
    context, training, symbolic = inner.seen
    assert context.entry_layer is model and training is True and not symbolic
    context.something = 1  # an effective weight can hang on it
    model(np.ones((1, 2)))
    assert inner.seen[0] is not context and inner.seen[1] is None
    assert _keras.call_context() is None and _keras.call_training() is None


def test_scopes():
    assert not _keras.in_stateless_scope() and not _keras.in_symbolic_scope()
    with keras.StatelessScope():
        assert _keras.in_stateless_scope()
    with keras.SymbolicScope():
        assert _keras.in_symbolic_scope()


def test_the_stored_value_is_not_cast_and_knows_scopes():
    class Reading(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(2,), initializer="ones")

        def call(self, x):
            self.seen = self.w.value.dtype, _keras.stored_value(self.w).dtype, _keras.autocast(self.w, tf.ones(2)).dtype
            return x

    layer = Reading(dtype="mixed_bfloat16")
    layer(np.ones((1, 2)))
    assert layer.seen == (tf.bfloat16, tf.float32, tf.bfloat16)
    with keras.StatelessScope([(layer.w, tf.zeros(2))]):
        assert not _keras.stored_value(layer.w).numpy().any()


def test_every_read_of_a_variable_goes_through_its_value():
    reads = []

    class Watched(keras.Variable):
        @property
        def value(self):
            reads.append(self.name)
            return super().value

    layer = built_dense()
    layer.kernel.__class__ = Watched
    layer(np.ones((1, 2)))
    tf.convert_to_tensor(layer.kernel)
    keras.ops.matmul(np.ones((1, 2)), layer.kernel)
    layer.kernel + 1.0
    assert len(reads) >= 4


def test_what_waits_for_a_deferred_variable():
    order = []

    class Inner(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(2,), initializer="ones", name="w")
            _keras.when_initialized(self.w, lambda: order.append(self.w.numpy().tolist()))
            order.append("built")

        def call(self, x):
            return x * self.w

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def call(self, x):
            return self.inner(x)

    Outer()(np.ones((1, 2)))
    assert order == ["built", [1.0, 1.0]]
    _keras.when_initialized(Outer().inner(np.ones((1, 2))) is None or built_dense().kernel, lambda: order.append("now"))
    assert order[-1] == "now"


def test_state_can_be_added_to_a_built_layer_and_taken_away():
    layer = built_dense()
    with _keras.unlocked(layer):
        layer.more = built_dense()
    assert len(layer.weights) == 4
    _keras.untrack(layer, layer.more)
    assert len(layer.weights) == 2
    try:
        layer.other = layers.Dense(2)
    except ValueError as error:
        assert "already built" in str(error)
    else:
        raise AssertionError("the layer is not locked")


def test_what_a_class_says_about_itself():
    assert _keras.has_own_build(layers.Dense(2))
    assert not _keras.has_own_build(Asking())
    assert not _keras.is_rematerialized(layers.Dense(2))
    with keras.RematScope(mode="full"):
        assert _keras.is_rematerialized(layers.Dense(2))


def test_call_on_the_instance_is_what_runs():
    layer = built_dense()
    vars(layer)["call"] = lambda x, training=None: "ours"
    assert layer(np.ones((1, 2))) == "ours"
