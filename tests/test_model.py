"""What makes a `tfloop.Model`: functional forms, clones, and layers that train."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tfloop

X = np.random.default_rng(0).normal(size=(10, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(10, 2)).astype("float32")


def functional(name=None):
    inputs = keras.Input((4,))
    hidden = layers.Dense(3, name="hidden")(inputs)
    model = tfloop.Model(inputs, layers.Dense(2, name="out")(hidden), name=name)
    model.add_loss(ops.mean(hidden**2), name="size", weight=0.5)
    model.add_metric(ops.max(hidden), name="largest", aggregation="max")
    model.add_metric(lambda t: ops.mean(t["hidden"]), name="mean")
    model.watch("hidden", "rms")
    model.parametrize("out/kernel", tfloop.SpectralNorm())
    return model


def fit(model):
    model.compile("sgd", "mse")
    return model.fit(X, Y, batch_size=4, shuffle=False, verbose=0).history


def test_a_clone_has_the_terms_and_parametrisations_and_weights_of_its_own():
    model = functional()
    clone = keras.models.clone_model(model)
    assert type(clone) is type(model)
    assert list(clone.effective_weights()) == ["out/kernel"]
    assert not {id(v) for v in model.weights} & {id(v) for v in clone.weights}
    clone.set_weights(model.get_weights())
    assert fit(clone) == fit(model)


def test_a_model_around_a_model_has_its_terms_once():
    inner = functional("inner")
    inputs = keras.Input((4,))
    outer = tfloop.Model(inputs, inner(inputs))
    np.testing.assert_array_equal(outer._tfloop_symbolic, [])
    hidden = inner.get_layer("hidden")(X).numpy()
    outer.compile(keras.optimizers.SGD(0.0), "mse")
    history = outer.fit(X, Y, batch_size=10, verbose=0).history
    assert list(history) == ["loss", "compiled_loss", "size", "largest", "mean", "inner/hidden/rms"]
    np.testing.assert_allclose(history["size"], 0.5 * np.mean(hidden**2), rtol=1e-5)
    np.testing.assert_allclose(history["mean"], hidden.mean(), rtol=1e-4, atol=1e-6)


def test_saving_says_what_a_file_cannot_hold(tmp_path):
    with pytest.warns(UserWarning, match="'mean'"):
        functional().save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert list(fit(loaded)) == ["loss", "compiled_loss", "size", "largest"]


class Quiet(tfloop.Model):
    """Its `call` names no `training`, as many do."""

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()
        self.drop = layers.Dropout(0.5)
        self.out = layers.Dense(2)

    def call(self, x):
        return self.out(self.drop(self.norm(x)))


def test_layers_train_also_where_call_names_no_training():
    model = Quiet()
    model.watch("drop", "zeros")
    model.compile("sgd", "mse")
    history = model.fit(X, Y, batch_size=10, epochs=3, verbose=0, validation_data=(X, Y)).history
    assert 0.2 < np.mean(history["drop/zeros"]) < 0.8
    assert history["val_drop/zeros"] == [0.0] * 3
    assert np.abs(model.norm.moving_mean).max() > 0


def test_a_functional_subclass_leaves_tfloop_model_as_it_is():
    class Encoder(tfloop.Model):
        def __init__(self):
            inputs = keras.Input((4,))
            super().__init__(inputs, layers.Dense(2)(inputs))
            self.extra = 3

    class Plain(tfloop.Model):
        def __init__(self, units):
            super().__init__()
            self.dense = layers.Dense(units)

        def call(self, x):
            return self.dense(x)

    encoder, before = Encoder(), tfloop.Model.__bases__
    assert encoder.extra == 3
    assert encoder(X).shape == (10, 2)
    assert Plain(2)(X).shape == (10, 2)
    assert tfloop.Model.__bases__ == before
    assert isinstance(encoder, tfloop.Model) and isinstance(encoder, keras.Model)
    assert list(fit(encoder)) == ["loss"]


def test_training_averaged_weights_is_refused():
    model = functional()
    average = tfloop.WeightAverage("ema", decay=0.5)
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0, callbacks=[average])
    with tfloop.averaged(model), pytest.raises(RuntimeError, match="averaged"):
        model.fit(X, Y, verbose=0)


def test_what_is_put_on_a_users_model_has_names_that_no_user_chooses():
    inputs = keras.Input((4,))
    made = {kind: kind(inputs, layers.Dense(2)(inputs)) for kind in (keras.Model, tfloop.Model)}
    for model in made.values():
        model.compile("sgd", "mse")
        model.fit(X, Y, verbose=0)
    theirs, ours = ({*dir(model), *vars(model)} for model in made.values())
    private = [n for n in ours - theirs - set(dir(tfloop.Layer)) if n[0] == "_" and not n.endswith("__")]
    assert not [n for n in private if not n.startswith("_tfloop_")]


def test_a_user_may_name_attributes_and_methods_as_tfloop_could_have():
    names = ["engine", "terms", "_terms", "_updates", "_loop", "_averages", "_choices", "_guarded", "_symbolic"]

    class Named(tfloop.Model):
        def __init__(self):
            super().__init__()
            for name in names:
                setattr(self, name, [layers.Dense(2)])

        def _forward(self, x):
            return sum(getattr(self, name)[0](x) for name in names)

        def run_step(self, x):
            return self._forward(x)

        def call(self, x):
            return self.run_step(x)

    model = Named()
    model.watch("*", "rms")
    assert set(fit(model)) == {"loss", *(f"{name}/0/rms" for name in names)}
    assert isinstance(model.engine[0], layers.Dense) and len(model.trainable_variables) == 2 * len(names)


def test_loss_scales_of_minimize_are_in_the_state_under_stable_names():
    class Two(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)
            self.second = keras.optimizers.SGD(0.1)

        def call(self, x):
            return self.dense(x)

        def train_step(self, data):
            self.minimize(lambda: ops.mean(self(data[0]) ** 2), self.trainable_variables, self.second)
            return {}

    keras.config.set_dtype_policy("mixed_float16")
    try:
        states = []
        for _ in range(2):
            model = Two()
            fit(model)
            states.append(tfloop.reproducibility.state_variables(model))
    finally:
        keras.config.set_dtype_policy("float32")
    assert list(states[0]) == list(states[1])
    assert int(states[0]["loss_scales/0/step_counter"]) == 3


class Recurrent(tfloop.Model):
    """Keras cannot build it on symbolic tensors: a stateful layer makes its state when it is built."""

    def __init__(self):
        super().__init__()
        self.memory = layers.LSTM(4, stateful=True)
        self.out = layers.Dense(1)

    def call(self, x):
        return self.out(self.memory(x))


@pytest.mark.parametrize("parametrized", [[], ["out/kernel"]])
def test_a_model_that_symbolic_tensors_cannot_build_is_built_by_a_trace(parametrized, recwarn):
    model = Recurrent()
    for path in parametrized:
        model.parametrize(path, tfloop.UnitNorm())
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(np.ones((8, 3, 2)), np.ones((8, 1)), batch_size=4, verbose=0)
    assert list(model.effective_weights()) == parametrized
    assert not [w for w in recwarn if "unbuilt state" in str(w.message)]
