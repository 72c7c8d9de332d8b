"""Parametrised weights in a `tfloop.Model`: every engine, several networks, files."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfloop


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


class Counted(tfloop.Parametrization):
    """The identity, which counts how often its state moved."""

    def build(self, shape):
        self.add_state("moves", (), "zeros")

    def call(self, raw, training=False):
        if training is not False:
            self.once_a_step(lambda: self.moves.assign_add(1.0))
        return raw * 1.0


class Net(tfloop.Model):
    """Calls one parametrised layer twice in a step, and one in a loop."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(8)
        self.norm = layers.BatchNormalization()
        self.rnn = layers.SimpleRNN(4)
        self.last = layers.Dense(3)
        self.parametrize("first/kernel", [tfloop.SpectralNorm(), Counted()])
        self.parametrize("*/recurrent_kernel", [tfloop.SpectralNorm(), Counted()])

    def call(self, x, training=None):
        h = self.norm(self.first(x) + self.first(-2 * x))
        self.add_loss(ops.mean(h**2), name="power", weight=1e-3)
        return self.last(self.rnn(ops.reshape(h, (-1, 4, 2))))


def moves(model):
    return [v.numpy() for v in model.weights if v.name == "moves"]


def trained(**compile_arguments):
    keras.utils.set_random_seed(1)
    model = Net()
    model.compile("sgd", "mse", **compile_arguments)
    history = model.fit(data(32, 6), data(32, 3), batch_size=8, epochs=2, verbose=0, shuffle=False).history
    return model, history["loss"]


@pytest.mark.parametrize(
    "engine",
    [{"run_eagerly": True}, {"jit_compile": False, "steps_per_execution": 4}],
    ids=["eager", "graph"],
)
def test_state_moves_once_a_step_in_every_engine(engine):
    model, losses = trained(**engine)
    assert moves(model) == [8, 8]
    model.evaluate(data(32, 6), data(32, 3), verbose=0)
    model.predict(data(32, 6), verbose=0)
    assert moves(model) == [8, 8]
    for kernel in model.effective_weights().values():
        np.testing.assert_allclose(np.linalg.norm(kernel, 2), 1.0, rtol=2e-2)
    np.testing.assert_allclose(losses, trained(run_eagerly=True)[1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("jit", ["step", "loop"])
def test_compiled(jit):
    def run(**arguments):
        keras.utils.set_random_seed(1)
        x = keras.Input((6,))
        shared = tfloop.SpectralNormalization(layers.Dense(6, activation="tanh"))
        model = tfloop.Model(x, layers.Dense(3)(shared(shared(x))))
        model.parametrize("*/bias", [Counted()])
        model.compile("sgd", "mse", **arguments)
        return model, model.fit(data(32, 6), data(32, 3), batch_size=8, epochs=2, verbose=0, shuffle=False).history

    model, history = run(jit_compile=jit)
    assert moves(model) == [8, 8]
    np.testing.assert_allclose(history["loss"], run(run_eagerly=True)[1]["loss"], rtol=1e-4)


def test_two_networks_and_their_optimizers():
    """The generator's loss goes through the discriminator, which is called three times in a step."""

    class Gan(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.generator = keras.Sequential([keras.Input((2,)), layers.Dense(4)])
            self.discriminator = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dense(1)])
            self.parametrize("discriminator/*/kernel", [tfloop.SpectralNorm(), Counted()])

        def build(self, shape):
            pass

        def call(self, z):
            return self.generator(z)

        def compile(self):
            super().compile()
            self.of_g, self.of_d = keras.optimizers.SGD(0.01), keras.optimizers.SGD(0.01)

        def train_step(self, real):
            z = real[:, :2]
            with tf.GradientTape() as tape:
                fake = self.generator(z, training=True)
                d_loss = ops.mean(self.discriminator(fake, training=True)) - ops.mean(
                    self.discriminator(real, training=True)
                )
            self.minimize(d_loss, self.discriminator.trainable_variables, self.of_d, tape=tape)
            with tf.GradientTape() as tape:
                g_loss = -ops.mean(self.discriminator(self.generator(z, training=True), training=True))
            self.minimize(g_loss, self.generator.trainable_variables, self.of_g, tape=tape)
            return {"d_loss": d_loss, "g_loss": g_loss}

    model = Gan()
    model.build((None, 2))
    before = model.generator.get_weights()
    model.compile()
    model.fit(data(32, 4), batch_size=8, epochs=2, verbose=0)
    assert moves(model) == [8, 8]
    assert np.any(before[0] != model.generator.get_weights()[0])
    for kernel in model.effective_weights().values():
        np.testing.assert_allclose(np.linalg.norm(kernel, 2), 1.0, rtol=3e-2)


def functional():
    x = keras.Input((6,))
    h = layers.Dense(5, name="hidden")(x)
    model = tfloop.Model(x, layers.Dense(3, name="out")(h))
    model.parametrize("*/kernel", ["spectral_norm", "weight_norm"])
    model.parametrize("hidden/bias", tfloop.Bounded(-1.0, 1.0))
    return model


def test_a_functional_model_is_restored(tmp_path):
    model = functional()
    model.compile("sgd", "mse")
    model.fit(data(16, 6), data(16, 3), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    made = type(model).from_config(model.get_config())
    made.set_weights(model.get_weights())
    for again in (loaded, made):
        assert list(again.effective_weights()) == ["hidden/kernel", "hidden/bias", "out/kernel"]
        np.testing.assert_allclose(again(data(4, 6)), model(data(4, 6)), rtol=1e-6)


def test_a_functional_model_is_baked_to_plain_keras(tmp_path):
    model = functional()
    baked = tfloop.bake(model)
    np.testing.assert_allclose(baked(data(4, 6)), model(data(4, 6)), rtol=1e-5, atol=1e-6)
    assert type(baked).__module__.startswith("keras.") and len(baked.weights) == 4
    baked.save(tmp_path / "plain.keras")
    assert "tfloop" not in str(keras.saving.serialize_keras_object(baked))


def test_a_plain_model_is_wrapped():
    plain = keras.Sequential([keras.Input((6,)), layers.Dense(3, name="dense")])
    model = tfloop.Model(plain.inputs, plain.outputs)
    assert model.parametrize("*", "spectral_norm") == ["dense/kernel", "dense/bias"]


def test_watching_sees_layers_and_no_parametrisations():
    model = functional()
    model.watch("*", "rms")
    model.compile("sgd", "mse")
    history = model.fit(data(16, 6), data(16, 3), verbose=0).history
    assert [name for name in history if name.endswith("/rms")] == ["hidden/rms", "out/rms"]


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": "loop"}], ids=str)
@pytest.mark.parametrize("lazy", [True, False], ids=["built by the step", "built"])
def test_a_model_that_is_never_called_is_parametrised(lazy, options):
    class Parts(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.net = layers.Dense(4)
            if not lazy:
                self.net.build((None, 6))
            self.own = keras.optimizers.SGD(0.1, momentum=0.9)

        def train_step(self, x):
            with tf.GradientTape() as tape:
                loss = ops.mean(self.net(x) ** 2)
            self.minimize(loss, self.trainable_variables, self.own, tape=tape)
            return {"power": loss}

    model, average = Parts(), tfloop.WeightAverage()
    assert model.parametrize("net/kernel", [tfloop.WeightNorm(), tfloop.SpectralNorm()]) == ["net/kernel"] * (not lazy)
    model.compile(**options)
    model.fit(data(8, 6), epochs=2, verbose=0, callbacks=[average])
    assert list(model.effective_weights()) == ["net/kernel"] and int(average.count.numpy()) == 2
    assert len(model.trainable_variables) == 3 and len(model.own.variables) == 5  # two of its own
    unknown = Parts()
    unknown.parametrize("nat/kernel", tfloop.SpectralNorm())
    unknown.compile(**options)
    with pytest.raises(ValueError, match="no weight matches"):
        unknown.fit(data(8, 6), verbose=0)
