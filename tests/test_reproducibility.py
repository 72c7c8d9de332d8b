"""Seeds, the names of state, and fingerprints."""

import random
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfloop import _keras, reproducibility
from tfloop.reproducibility import (
    assign,
    current_seed,
    fingerprint,
    first_difference,
    metric_variables,
    process_variables,
    set_seed,
    snapshot,
    state_variables,
)

layers = keras.layers


class Block(layers.Layer):
    def __init__(self):
        super().__init__()
        self.noise = [keras.random.SeedGenerator(1), keras.random.SeedGenerator(2)]
        self.calls = tf.Variable(0)
        self.scale = self.add_weight(shape=())  # no name: Keras numbers it across the process

    def call(self, x):
        return x * self.scale


class Everything(keras.Model):
    """A model with two optimizers, nested layers, random numbers and a plain tf.Variable."""

    def __init__(self):
        super().__init__()
        self.body = keras.Sequential([layers.Dense(3), layers.Dense(3), layers.Dropout(0.5)])
        self.blocks = [Block(), Block()]
        self.head = layers.Dense(1)
        self.head_optimizer = keras.optimizers.SGD(momentum=0.9)
        self.build((None, 4))

    def build(self, shape):
        self.body.build(shape)
        self.head.build((None, 3))
        super().build(shape)

    def extra_state(self):
        return {"updates": self.blocks[0].calls, "average/head": self.head.bias}


def everything():
    model = Everything()
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()))
    model.optimizer.build(model.body.trainable_variables)
    model.head_optimizer.build(model.head.trainable_variables)
    return model


def functional():
    x = keras.Input((4,))
    y = layers.Dense(2)(layers.Dropout(0.5)(layers.Dense(3, name="dense_1")(x))) + layers.Dense(2)(x)
    model = keras.Model(x, y)
    model.compile("adam", "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    return model


def draws():
    return (
        random.random(),
        np.random.rand(),
        float(tf.random.uniform(())),
        float(keras.random.uniform(())),
    )


def test_set_seed_repeats_every_kind_of_random_number():
    set_seed(5)
    first = draws()
    set_seed(6)
    other = draws()
    set_seed(5)
    assert draws() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_the_seed_in_force_is_the_last_one_given_to_tfloop_or_keras():
    set_seed(5)
    assert current_seed() == 5
    keras.utils.set_random_seed(7)
    assert current_seed() == 7
    set_seed(5)
    keras.backend.clear_session()  # forgets Keras' record, not ours
    assert current_seed() == 5


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_numpys_range_is_refused(seed):
    with pytest.raises(ValueError, match=str(seed)):
        set_seed(seed)


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(TypeError, match="integer"):
        set_seed(seed)


def test_state_holds_weights_seeds_plain_variables_and_all_optimizers():
    state = state_variables(everything())
    for name in [
        "body/dense/kernel",
        "body/dense_1/bias",
        "body/dropout/seed_generator",
        "blocks/0/noise/1",
        "blocks/1/variable",
        "blocks/1/calls",
        "optimizer/dynamic_scale",
        "optimizer/inner_optimizer/iterations",
        "optimizer/inner_optimizer/velocities/body/dense_1/kernel",
        "head_optimizer/momentums/head/kernel",
    ]:
        assert name in state, name
    assert "average/head" not in state, "a variable has one name, its first"


@pytest.mark.parametrize("build", [everything, functional])
def test_names_do_not_depend_on_what_was_built_before(build):
    first = list(state_variables(build()))
    (
        layers.Dense(1),
        keras.random.SeedGenerator(),
        keras.Variable(0.0),
        layers.Add(),
        layers.Dropout(0.1),
    )
    second = list(state_variables(build()))
    assert first == second


def test_a_given_name_that_looks_automatic_keeps_its_own_variables():
    state = state_variables(functional())
    kernels = [name for name in state if name.endswith("kernel") and "optimizer" not in name]
    assert len(kernels) == 3


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(momentum=0.9),
        keras.optimizers.AdamW(use_ema=True),
        keras.optimizers.Adam(amsgrad=True, gradient_accumulation_steps=2),
        keras.optimizers.Adafactor(),
        keras.optimizers.Muon(),
        keras.optimizers.Nadam(),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop()),
        keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(keras.optimizers.Adam(), {".*/bias": keras.optimizers.SGD(momentum=0.9)})
        ),
    ],
    ids=lambda o: o.name,
)
def test_every_optimizer_variable_is_in_the_state_under_a_stable_name(optimizer):
    model = functional()
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    state = state_variables(model)
    assert {id(v) for v in optimizer.variables} <= {id(v) for v in state.values()}
    assert not [name for name in state if "/variables/" in name], "a slot without an attribute"


class Mean(tf.Module):
    def __init__(self):
        super().__init__()
        self.value = tf.Variable(0.0)
        self.noise = tf.random.Generator.from_seed(1)


class Trainer:
    """A plain object: Keras looks into none."""

    def __init__(self, model):
        self.model, self.itself, self.name, self.numbers = model, self, "trainer", list(range(10))
        self.target = keras.Sequential([layers.Dense(2), layers.BatchNormalization()])
        self.target.build((None, 3))
        self.optimizer = keras.optimizers.SGD()
        self.means = {"loss": [Mean(), tf.Variable(1)]}


def test_state_in_plain_objects_and_modules_is_found():
    model = functional()
    without = state_variables(model)
    model.trainer, model.mean = Trainer(model), Mean()
    model.mean.trainer = model.trainer
    assert set(without) < set(state_variables(model))
    assert sorted(set(state_variables(model)) - set(without)) == [
        *("mean/noise", "mean/value", "trainer/means/loss/0/noise", "trainer/means/loss/0/value"),
        *("trainer/means/loss/1", "trainer/optimizer/iterations", "trainer/optimizer/learning_rate"),
        *(f"trainer/target/batch_normalization/{name}" for name in ("beta", "gamma", "moving_mean", "moving_variance")),
        *("trainer/target/dense/bias", "trainer/target/dense/kernel"),
    ]
    assert reproducibility.unbuilt_optimizers(model) == ["trainer/optimizer"]
    assert reproducibility.weights(model).keys() == {n for n in without if n.startswith("dense")}


def test_metrics_are_apart_from_the_state():
    model = functional()
    model.fit(np.ones((4, 4)), np.ones((4, 2)), verbose=0)
    metrics = metric_variables(model)
    assert "metrics/loss/total" in metrics
    assert not {id(v) for v in metrics.values()} & {id(v) for v in state_variables(model).values()}
    before = fingerprint(model)
    model.reset_metrics()
    assert fingerprint(model) == before


@pytest.mark.parametrize("value", [None, 3, [np.ones(2)]])
def test_a_fingerprint_is_of_a_model(value):
    with pytest.raises(TypeError, match="expected a model or a layer"):
        fingerprint(value)


def test_a_fingerprint_sees_every_single_variable():
    model = everything()
    seen = {fingerprint(model)}
    variables = state_variables(model)
    for variable in variables.values():
        old = snapshot({"v": variable})["v"]
        variable.assign(old + np.ones((), old.dtype))
        seen.add(fingerprint(model))
        variable.assign(old)
    assert len(seen) == 1 + len(variables)


def test_a_snapshot_is_a_copy_and_restores_every_bit():
    model = everything()
    before, variables = fingerprint(model), state_variables(model)
    saved = snapshot(variables)
    for variable in variables.values():
        value = snapshot({"v": variable})["v"]
        variable.assign(value + np.ones((), value.dtype))
    assert fingerprint(model) != before
    assign(variables, saved)
    assert fingerprint(model) == before


def test_a_reader_reads_what_a_snapshot_does_as_it_is_at_each_call():
    model = everything()
    variables = state_variables(model)
    read = reproducibility.Reader(variables)
    first = read()
    assert first_difference(first, snapshot(variables)) is None
    for variable in variables.values():
        value = snapshot({"v": variable})["v"]
        variable.assign(value + np.ones((), value.dtype))
    assert first_difference(read(), snapshot(variables)) is None
    assert first_difference(first, read()) is not None, "the first was copied out"


def test_the_first_difference_names_the_variable_and_how_much():
    a = {"w": np.zeros(3, "f"), "b": np.array(1.0)}
    assert first_difference(a, {"w": np.zeros(3, "f"), "b": np.array(1.0)}) is None
    assert "'w' float32[3] differs in 1 of 3 elements, by 0.5" in first_difference(
        a, a | {"w": np.array([0, 0.5, 0], "f")}
    )
    assert "'b' is only in the first" in first_difference(a, {"w": a["w"]})
    assert "'c' is only in the second" in first_difference(a, a | {"c": a["b"]})
    assert "float64[3]" in first_difference(a, a | {"w": np.zeros(3)})
    assert first_difference({"x": np.array([np.nan, 0.0])}, {"x": np.array([np.nan, 0.0])}) is None
    assert "by 0 at most" in first_difference({"x": np.array([0.0])}, {"x": np.array([-0.0])})


def test_half_precision_state_is_read_as_it_is():
    variable = keras.Variable([1.0, 2.0], dtype="bfloat16")
    saved = snapshot({"v": variable})
    variable.assign([0.0, 0.0])
    assign({"v": variable}, saved)
    assert snapshot({"v": variable})["v"].tolist() == [1.0, 2.0]


def test_python_and_numpy_random_states_come_back():
    random.gauss(0, 1), np.random.randn()  # each keeps the second of a pair
    saved = reproducibility.random_state()
    first = random.random(), np.random.randn()
    reproducibility.set_random_state(saved)
    assert (random.random(), np.random.randn()) == first


def test_the_global_seed_generator_is_process_state():
    set_seed(1)
    assert process_variables() == {}
    saved = snapshot(process_variables(create=True))
    first = float(keras.random.uniform(()))
    assign(process_variables(), saved)
    assert float(keras.random.uniform(())) == first


def test_the_private_names_still_mean_what_they_did():
    dropout = layers.Dropout(0.5, seed=3)
    assert [g.state for g in _keras.seed_generators(dropout)] == [dropout.seed_generator.state]
    weight = keras.Variable(0.0)
    optimizer = keras.optimizers.SGD()
    optimizer.build([weight])
    assert _keras.optimizer_targets(optimizer) == [weight]
    for made in (layers.LSTM(1), layers.Conv2DTranspose(1, 1), keras.metrics.MeanSquaredError()):
        assert reproducibility._is_automatic(made), made.name


def test_what_orders_the_data_of_a_run_is_its_threads_own():
    set_seed(3)
    seen = []
    with reproducibility.ordering(7):
        thread = threading.Thread(target=lambda: seen.append(reproducibility.current_seed()))
        thread.start()
        thread.join()
    assert seen == [3]
