"""Parametrising whole models by pattern; saving, cloning and baking them."""

import subprocess
import sys
import textwrap
from copy import deepcopy

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfloop import names, weights
from tfloop.model import Model


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@keras.saving.register_keras_serializable("tests")
class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.encoder = keras.Sequential([layers.Dense(6, name="a"), layers.Dense(5, name="b")])
        self.heads = {"x": layers.Dense(2), "y": layers.Dense(3)}
        self.norm = layers.BatchNormalization()

    def call(self, x):
        h = self.norm(self.encoder(x))
        return {name: head(h) for name, head in self.heads.items()}

    def get_config(self):
        return {"name": self.name}


def functional():
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(2, name="out")(layers.Dense(3, name="hidden")(x)))


def trained(model):
    model.compile("sgd", "mse")
    model.fit(data(16, 4), data(16, 2), epochs=2, verbose=0)
    return model


# By pattern --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("encoder/*/kernel", ["encoder/a/kernel", "encoder/b/kernel"]),
        ("*/kernel", ["encoder/a/kernel", "encoder/b/kernel", "heads/x/kernel", "heads/y/kernel"]),
        ("heads/x/*", ["heads/x/kernel", "heads/x/bias"]),
        ("gamma", ["norm/gamma"]),
    ],
)
def test_what_a_pattern_matches(pattern, expected):
    built, unbuilt = Net(), Net()
    built(data(2, 4))
    assert weights.parametrize(built, pattern, "unit_norm") == expected
    assert weights.parametrize(unbuilt, pattern, "unit_norm") == []
    unbuilt(data(2, 4))
    for model in (built, unbuilt):
        assert list(weights.effective_weights(model)) == expected


@pytest.mark.parametrize(
    "make",
    [
        functional,
        lambda: keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)]),
        lambda: keras.Sequential([layers.Dense(3), layers.Dense(2)]),
        Net,
        lambda: layers.Dense(3),
    ],
)
def test_any_model(make):
    model = make()
    pattern = "kernel"
    weights.parametrize(model, pattern, weights.Function(zero))
    outputs = model(data(2, 4))
    for y in keras.tree.flatten(outputs):
        assert not y.numpy().any()  # biases are zero
    raw = [v for v in model.weights if v.name == "kernel"]
    assert all(v.numpy().any() for v in raw)


@keras.saving.register_keras_serializable("tests")
def zero(raw):
    return 0.0 * raw


def test_no_match():
    model = functional()
    with pytest.raises(ValueError, match=r"'\*/kernl'.*Did you mean.*'hidden/kernel', 'hidden/bias'"):
        weights.parametrize(model, "*/kernl", "unit_norm")
    unbuilt = Net()
    weights.parametrize(unbuilt, "*/kernl", "unit_norm")
    for _ in range(2):  # nor does a second call pass it over
        with pytest.raises(ValueError, match=r"'\*/kernl'"):
            unbuilt(data(2, 4))


def test_what_waits_is_applied_whatever_makes_the_weights():
    class Untraceable(keras.Model):
        """Keras cannot build it by a symbolic call."""

        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x) if np.asarray(x).any() else x

    class BuiltByHand(Untraceable):
        def __init__(self):
            super().__init__()
            weights.parametrize(self, "*/kernel", weights.Function(zero))
            self.dense.build((None, 4))
            self.built = True

    called, by_hand, asked = Untraceable(), BuiltByHand(), BuiltByHand()
    weights.parametrize(called, "*/kernel", weights.Function(zero))
    for model in (called, by_hand):
        assert not model(data(2, 4)).numpy().any()
    assert list(weights.effective_weights(asked)) == ["dense/kernel"]


def test_a_name_that_does_not_exist_is_refused_at_once():
    with pytest.raises(ValueError, match="no parametrisation 'spectralnorm'"):
        weights.parametrize(Net(), "*", "spectralnorm")


class Unwilling(weights.Parametrization):
    """Starts from no weight of two columns."""

    def call(self, raw):
        return 2.0 * raw

    def start(self, weight):
        if weight.shape[-1] == 2:
            raise ValueError("no start")
        return weight / 2, {}


@pytest.mark.parametrize(
    ("pattern", "parametrization", "message"),
    [
        ("*", weights.UnitNorm(axis=1), "axis=1 does not fit"),
        ("*/kernel", lambda raw: raw if raw.shape[1] == 3 else raw[:1], "makes a weight of shape"),
        ("*/kernel", Unwilling(), "no start"),
        ("*/none", "unit_norm", "no weight matches"),
        (["*/kernel"], "unit_norm", r"\['\*/kernel'\]\): expected one pattern"),
    ],
)
def test_what_fails_leaves_the_model_as_it_was(pattern, parametrization, message, tmp_path):
    plain = functional()
    model = Model(plain.input, plain.output)
    before = [w.numpy() for w in model.weights]
    with pytest.raises((ValueError, TypeError), match=message):
        model.parametrize(pattern, parametrization)
    assert model.effective_weights() == {}
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    model.save(tmp_path / "model.keras")
    equal(model, keras.saving.load_model(tmp_path / "model.keras"))


def test_states_are_not_matched():
    model = functional()
    weights.parametrize(model, "*/kernel", "spectral_norm")
    assert weights.parametrize(model, "*kernel*", "centered") == ["hidden/kernel", "out/kernel"]


def test_layers_inside_a_parametrisation_are_not_matched():
    class Mixed(weights.Parametrization):
        def __init__(self):
            super().__init__()
            self.mixing = layers.Dense(2, use_bias=False)

        def build(self, shape):
            self.mixing.build(shape)

        def call(self, raw):
            return self.mixing(raw)

    model = functional()
    assert weights.parametrize(model, "out/kernel", Mixed()) == ["out/kernel"]
    assert weights.parametrize(model, "*kernel", lambda raw: 2.0 * raw) == ["hidden/kernel", "out/kernel"]
    hidden, out = (model.get_layer(name) for name in ("hidden", "out"))
    (mixing,) = [v for v in out.weights if v.shape == (2, 2)]
    kernels = 2 * hidden.kernel.numpy() @ (2 * out.kernel.numpy() @ mixing.numpy())
    np.testing.assert_allclose(model(np.eye(4)), kernels, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights.bake(model)(np.eye(4)), kernels, rtol=1e-5, atol=1e-6)


def test_shared_layers_are_parametrised_once():
    shared = layers.Dense(4)
    x = keras.Input((4,))
    model = keras.Model(x, shared(shared(x)))
    assert weights.parametrize(model, "*/kernel", lambda raw: 2.0 * raw) == [f"{shared.name}/kernel"]
    k = shared.kernel.numpy()
    np.testing.assert_allclose(model(np.eye(4)), 4 * k @ k, rtol=1e-5, atol=1e-6)


def test_warm_start_after_weights_were_set_by_hand():
    model = functional()
    weights.parametrize(model, "*/kernel", "spectral_norm")
    hidden = model.get_layer("hidden")
    hidden.kernel.assign(data(4, 3))
    hidden.kernel.assign(np.eye(4, 3) * [1, 9, 2])
    weights.warm_start(model)
    np.testing.assert_allclose(
        weights.effective_weights(model)["hidden/kernel"], np.eye(4, 3) * [1, 9, 2] / 9, rtol=1e-3
    )


def test_warm_start_leaves_what_is_trained():
    model = functional()
    weights.parametrize(model, "*/kernel", "weight_norm")
    before = [v.numpy() for v in model.weights]
    weights.warm_start(model)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_effective_weights_are_what_the_forward_pass_uses():
    model = functional()
    weights.parametrize(model, "*/kernel", ["spectral_norm", "centered"])
    effective = weights.effective_weights(model)
    expected = data(2, 4) @ effective["hidden/kernel"].numpy() @ effective["out/kernel"].numpy()
    np.testing.assert_allclose(model(data(2, 4)), expected, rtol=1e-5, atol=1e-6)


# Files and copies --------------------------------------------------------------------------------


def wrapped():
    return keras.Sequential(
        [
            keras.Input((4,)),
            weights.SpectralNormalization(layers.Dense(3), iterations=2, norm=2.0, name="first"),
            weights.Parametrized(
                layers.Dense(2),
                {"kernel": [weights.WeightNorm(), weights.Bounded(-3.0, 3.0)], "bias": weights.Function(zero)},
            ),
        ]
    )


def equal(a, b):
    for v, w in zip(a.weights, b.weights, strict=True):
        np.testing.assert_array_equal(v, w)
    np.testing.assert_allclose(a(data(3, 4)), b(data(3, 4)), rtol=1e-6)


def test_a_keras_file(tmp_path):
    model = trained(wrapped())
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    equal(model, again)
    assert again.layers[0].get_config()["iterations"] == 2
    model.fit(data(16, 4), data(16, 2), verbose=0, shuffle=False)
    again.fit(data(16, 4), data(16, 2), verbose=0, shuffle=False)
    equal(model, again)


@keras.saving.register_keras_serializable("tests")
class Normed(keras.Model):
    """Parametrises itself before it is built."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(2)
        weights.parametrize(self, "*/kernel", [weights.SpectralNorm(norm=0.1), weights.WeightNorm()])

    def call(self, x):
        return self.dense(x)


def nesting():
    x = keras.Input((4,))
    return keras.Model(x, Normed()(x))


@pytest.mark.parametrize("make", [Normed, nesting])
@pytest.mark.parametrize("again", ["load", "copy"])
def test_a_model_that_parametrises_itself_comes_back_as_it_was(make, again, tmp_path):
    model = make()
    trained(model).save(tmp_path / "model.keras")
    loaded = deepcopy(model) if again == "copy" else keras.saving.load_model(tmp_path / "model.keras")
    assert len(weights.effective_weights(loaded)) == 1
    equal(model, loaded)


@keras.saving.register_keras_serializable("tests")
class NormedFromOutside(Model):
    """Parametrises one layer itself; the others are."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.out = layers.Dense(3), layers.Dense(2)
        self.parametrize("dense/kernel", weights.UnitNorm(axis=(0,)))

    def call(self, x):
        return self.out(self.dense(x))

    def get_config(self):
        return {"name": self.name}


@keras.saving.register_keras_serializable("tests")
class FunctionalFromOutside(Model):
    def __init__(self, **kwargs):
        x = keras.Input((4,))
        super().__init__(x, layers.Dense(2, name="out")(layers.Dense(3, name="dense")(x)), **kwargs)
        self.parametrize("dense/kernel", weights.UnitNorm(axis=(0,)))


@pytest.mark.parametrize("make", [NormedFromOutside, FunctionalFromOutside])
def test_what_a_class_does_not_parametrise_itself_is_in_its_file_too(make, tmp_path):
    model = make()
    model(data(2, 4))
    model.parametrize("out/kernel", [weights.SpectralNorm(norm=0.1), "weight_norm"])
    trained(model).save(tmp_path / "model.keras")
    for again in (keras.saving.load_model(tmp_path / "model.keras"), deepcopy(model)):
        equal(model, again)
        assert [len(v.parametrizations) for v in (again.layers[-2].kernel, again.layers[-1].kernel)] == [1, 2]
    with pytest.warns(UserWarning, match="would be loaded with"):
        np.testing.assert_allclose(weights.bake(model)(data(3, 4)), model(data(3, 4)), rtol=1e-5, atol=1e-6)


def test_what_a_file_cannot_say_is_warned_of(tmp_path):
    model = NormedFromOutside()
    model(data(2, 4))
    model.parametrize("out/kernel", lambda raw: 2.0 * raw)
    with pytest.warns(UserWarning, match=r"does not say how it was parametrised: Function.* cannot be written"):
        model.save(tmp_path / "model.keras")


def test_a_weights_file(tmp_path):
    model, again = trained(wrapped()), wrapped()
    model.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    equal(model, again)


def test_a_weights_file_of_a_parametrised_model(tmp_path):
    model, again = functional(), functional()
    for m in (model, again):
        weights.parametrize(m, "*/kernel", ["spectral_norm", "weight_norm"])
    trained(model).save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    equal(model, again)


def test_clones_and_configs():
    model = wrapped()
    for copy in (
        keras.models.clone_model(model),
        type(model).from_config(model.get_config()),
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model)),
    ):
        assert list(names.weight_names(copy)) == list(names.weight_names(model))
        copy.set_weights(model.get_weights())
        equal(model, copy)


def test_a_tensorflow_checkpoint(tmp_path):
    model, again = trained(wrapped()), wrapped()
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    tf.train.Checkpoint(model=again).restore(path).assert_existing_objects_matched()
    equal(model, again)


def test_the_config_of_a_parametrised_model():
    model, again = functional(), functional()
    weights.parametrize(model, "*/kernel", [weights.SpectralNorm(iterations=3), weights.WeightNorm()])
    weights.parametrize(model, "*/kernel", weights.Function(zero))
    config = weights.parametrization_config(model)
    assert [entry["pattern"] for entry in config] == ["*/kernel", "*/kernel"]
    assert [c["class_name"] for entry in config for c in entry["parametrization"]] == [
        "SpectralNorm",
        "WeightNorm",
        "Function",
    ]
    weights.restore_parametrizations(again, config)
    assert list(names.weight_names(again)) == list(names.weight_names(model))
    again.set_weights(model.get_weights())
    equal(model, again)
    assert weights.parametrization_config(functional()) == []
    weights.restore_parametrizations(again, None)


# What rewrites weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [True, False])
def test_a_parametrised_layer_is_not_quantised_before_it_is_baked(wrap):
    x = keras.Input((16,))
    layer = layers.Dense(8, name="dense")
    model = keras.Model(x, (weights.SpectralNormalization(layer) if wrap else layer)(x))
    if not wrap:
        weights.parametrize(model, "*/kernel", "spectral_norm")
    expected = model(data(3, 16)).numpy()
    with pytest.raises(NotImplementedError, match=r"'kernel' of 'dense' is parametrised.*tfloop.bake"):
        layer.quantize("int8")
    with pytest.warns(UserWarning):
        model.quantize("int8")
    np.testing.assert_array_equal(model(data(3, 16)), expected)
    baked = weights.bake(model)
    baked.quantize("int8")
    np.testing.assert_allclose(baked(data(3, 16)), expected, atol=0.02)


def test_lora_and_parametrisations_are_refused_together():
    model, adapted = functional(), functional()
    weights.parametrize(model, "out/kernel", "spectral_norm")
    with pytest.raises(ValueError, match=r"enable_lora: 'kernel' of 'out' is parametrised.*tfloop.bake"):
        model.get_layer("out").enable_lora(2)
    weights.bake(model).get_layer("out").enable_lora(2)
    adapted.get_layer("out").enable_lora(2)
    with pytest.raises(ValueError, match="'out/kernel': 'out' has LoRA enabled"):
        weights.parametrize(adapted, "*/kernel", "spectral_norm")
    assert weights.effective_weights(adapted) == {}


# Baking ------------------------------------------------------------------------------------------


def test_baked_is_plain():
    model = trained(wrapped())
    baked = weights.bake(model)
    np.testing.assert_allclose(baked(data(3, 4)), model(data(3, 4)), rtol=1e-5)
    assert [type(layer) for layer in baked.layers] == [layers.Dense, layers.Dense]
    assert [layer.name for layer in baked.layers] == [layer.name for layer in model.layers]
    assert len(baked.weights) == 4 and "tfloop" not in str(baked.get_config())


@pytest.mark.parametrize("make", [functional, Net])
def test_baking_a_parametrised_model(make):
    model = make()
    model(data(2, 4))
    weights.parametrize(model, "*/kernel", "spectral_norm")
    before = [v.numpy() for v in model.weights]
    baked = weights.bake(model)
    for a, b in zip(*(keras.tree.flatten(m(data(3, 4))) for m in (baked, model)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert weights.effective_weights(baked) == {}
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@keras.saving.register_keras_serializable("tests")
class ParametrizesItself(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        weights.parametrize(self, "*/kernel", "weight_norm")


@keras.saving.register_keras_serializable("tests")
class WrapsItself(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        wrapped = {name: weights.Parametrized(head, {"kernel": "weight_norm"}) for name, head in self.heads.items()}
        self.encoder, self.heads = weights.SpectralNormalization(self.encoder), wrapped


@pytest.mark.parametrize("make", [ParametrizesItself, WrapsItself])
def test_baking_takes_away_what_the_copy_parametrised_itself_and_says_so(make):
    model = make()
    model(data(2, 4))
    with pytest.warns(UserWarning, match="a file of it would be loaded with these parametrisations"):
        baked = weights.bake(model)
    np.testing.assert_allclose(baked(data(3, 4))["x"], model(data(3, 4))["x"], rtol=1e-5, atol=1e-6)
    assert weights.effective_weights(baked) == {} and len(baked.weights) == len(model.weights) - 4
    assert weights.parametrization_config(baked) == []


def with_terms(of):
    """Two layers of one shape whose order another graph, with a symbolic loss, reverses; or layers for terms only."""
    x = keras.Input((4,))
    a, b = layers.Dense(4, name="a")(x), layers.Dense(4, name="b")(x)
    model = Model(x, [a, b])
    if of == "layers of their own":
        model.add_loss(ops.mean(layers.Dense(3)(a)))
        model.add_metric(ops.mean(layers.Dense(2)(b)), name="second")
    else:
        model.add_loss(ops.mean(ops.tanh(ops.tanh(b))))
    return keras.Model(outer := keras.Input((4,)), model(outer)) if of == "inside" else model


@pytest.mark.parametrize("of", ["an output", "layers of their own", "inside"])
def test_baking_a_model_with_losses_on_symbolic_tensors(of):
    model = with_terms(of)
    weights.parametrize(model, "*a/kernel", "spectral_norm")
    np.testing.assert_allclose(weights.bake(model)(data(3, 4)), model(data(3, 4)), rtol=1e-5, atol=1e-6)


@keras.saving.register_keras_serializable("tests")
class Nameless(layers.Layer):
    def __init__(self, units):
        super().__init__()
        self.units = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, x):
        return x @ self.kernel

    def get_config(self):
        return {"units": self.units}


def test_baking_a_wrapped_layer_whose_constructor_takes_no_name():
    model = keras.Sequential([keras.Input((4,)), weights.SpectralNormalization(Nameless(2))])
    np.testing.assert_allclose(weights.bake(model)(data(3, 4)), model(data(3, 4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [True, False])
def test_baking_needs_nothing_registered(wrap):
    class Doubled(layers.Dense):
        def call(self, x):
            return 2.0 * super().call(x)

    tripled, layer, x = weights.Function(lambda raw: 3.0 * raw), Doubled(2), keras.Input((4,))
    model = keras.Model(x, (weights.Parametrized(layer, {"kernel": tripled}) if wrap else layer)(x))
    if not wrap:
        weights.parametrize(model, "kernel", tripled)
    baked = weights.bake(Model(model.inputs, model.outputs) if wrap else model)
    np.testing.assert_allclose(baked(data(3, 4)), model(data(3, 4)), rtol=1e-5)
    assert type(baked.layers[1]) is Doubled and weights.effective_weights(baked) == {}


def test_baking_a_subclassed_model_of_a_class_that_is_not_registered():
    class Local(Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.out = layers.Dense(2)

        def call(self, x):
            return self.out(x)

    model = Local()
    weights.parametrize(model, "*/kernel", weights.Function(lambda raw: 3.0 * raw))
    np.testing.assert_allclose(model(data(3, 4)), weights.bake(model)(data(3, 4)), rtol=1e-5)


def test_baking_what_is_not_built():
    with pytest.raises(ValueError, match="is not built"):
        weights.bake(Net())


@pytest.mark.slow
def test_a_baked_file_loads_without_tfloop(tmp_path):
    x = keras.Input((5, 4))
    h = layers.TimeDistributed(weights.SpectralNormalization(layers.Dense(3)))(x)
    model = keras.Model(x, layers.RNN(weights.SpectralNormalization(layers.GRUCell(2)))(h))
    weights.bake(model).save(tmp_path / "plain.keras")
    np.save(tmp_path / "y.npy", model(data(2, 5, 4)))
    code = f"""
        import sys
        sys.modules["tfloop"] = None
        import keras, numpy as np
        model = keras.saving.load_model(r"{tmp_path}/plain.keras")
        x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype("float32")
        np.testing.assert_allclose(model(x), np.load(r"{tmp_path}/y.npy"), rtol=1e-5)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
