"""One rule names layers and weights: attributes in subclassed models, layer names in functional ones."""

import keras
import numpy as np
import pytest
from keras import layers

from tfloop import names


class Block(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.norm = layers.BatchNormalization()

    def call(self, x):
        return self.norm(self.dense(x))


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.encoder = Block()
        self.blocks = [Block(), Block()]
        self.heads = {"a": layers.Dense(2)}
        self.again = self.encoder
        self.seq = keras.Sequential([layers.Dense(3, name="first"), layers.Dense(3, name="second")])

    def call(self, x):
        x = self.encoder(x)
        for block in self.blocks:
            x = block(x)
        return self.heads["a"](self.seq(x))


def test_attributes_lists_dicts_and_sequential_models():
    model = Net()
    model(np.ones((2, 5)))
    assert list(names.layer_names(model).values()) == [
        "encoder",
        "encoder/dense",
        "encoder/norm",
        "blocks/0",
        "blocks/0/dense",
        "blocks/0/norm",
        "blocks/1",
        "blocks/1/dense",
        "blocks/1/norm",
        "heads/a",
        "seq",
        "seq/first",
        "seq/second",
    ]


def test_weights_are_named_by_their_layer_and_variable():
    model = Net()
    model(np.ones((2, 5)))
    named = names.weight_names(model)
    assert named["blocks/1/norm/moving_mean"] is model.blocks[1].norm.moving_mean
    assert named["heads/a/kernel"] is model.heads["a"].kernel
    assert {id(v) for v in named.values()} == {id(v) for v in model.weights}


def test_a_functional_model_uses_layer_and_operation_names():
    x = keras.Input((4,))
    h = layers.Dense(3, name="hidden")(x)
    inner = keras.Sequential([layers.Dense(2, name="deep")], name="inner")
    model = keras.Model(x, keras.ops.mean(inner(h), axis=1))
    found = list(names.layer_names(model).values())
    assert found[:3] == ["hidden", "inner", "inner/deep"]
    assert found[3].startswith("mean")


def test_two_variables_of_one_name_in_one_layer_are_told_apart():
    class Two(layers.Layer):
        def build(self, shape):
            self.one = self.add_weight(shape=(1,), name="w")
            self.two = self.add_weight(shape=(2,), name="w")

    layer = Two()
    layer.build((1,))
    assert {n: tuple(v.shape) for n, v in names.weight_names(layer).items()} == {"w": (1,), "w:1": (2,)}


@pytest.mark.parametrize("wrapper", [layers.TimeDistributed, layers.Bidirectional])
def test_every_weight_of_a_wrapped_layer_has_one_name(wrapper):
    layer = wrapper(layers.LSTM(3) if wrapper is layers.Bidirectional else layers.Dense(3))
    layer(np.ones((2, 4, 5)))
    assert len(names.weight_names(layer)) == len(layer.weights)


def test_messages_name_what_is_near():
    assert names.nearest("hiden", ["hidden", "logits"]) == "Did you mean 'hidden'?"
    assert "7 more" in names.listing(map(str, range(37)))
