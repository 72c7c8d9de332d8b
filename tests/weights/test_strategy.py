"""Parametrised weights on two replicas of one machine, each of which runs in a thread of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import json
import keras, numpy as np, tensorflow as tf
from keras import layers
from tfloop import weights
from tfloop.step import Step, running

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
x = np.random.default_rng(0).standard_normal((8, 6)).astype("float32")

def trained(replicas):
    strategy = tf.distribute.MirroredStrategy([f"cpu:{i}" for i in range(replicas)])
    with strategy.scope():
        model = keras.Sequential([
            keras.Input((6,)),
            weights.SpectralNormalization(layers.Dense(5, activation="tanh", kernel_initializer="ones")),
            weights.Parametrized(layers.Dense(2), {"kernel": ["spectral_norm", "weight_norm"]}),
        ])
        rng = np.random.default_rng(1)
        for v in model.trainable_weights:
            v.assign(rng.standard_normal(v.shape))
        weights.warm_start(model)
        optimizer = keras.optimizers.SGD(0.05)
        optimizer.build(model.trainable_variables)

    def step(x):
        with running(Step()):
            with tf.GradientTape() as tape:
                real, fake = model(x, training=True), model(-x, training=True)
                loss = tf.reduce_sum((real - 1.0) ** 2 + fake ** 2) / 8
            gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
            optimizer.apply(gradients, model.trainable_variables)

    @tf.function
    def chunk(parts):
        def body(i):
            strategy.run(step, args=(parts,))
            return i + 1
        tf.while_loop(lambda i: i < 5, body, [0])

    def part(context):
        size = 8 // replicas
        return tf.constant(x)[context.replica_id_in_sync_group * size:][:size]

    chunk(strategy.experimental_distribute_values_from_function(part))
    states = [v for v in model.weights if v.name == "u"]
    return {
        "weights": [v.numpy().tolist() for v in model.weights],
        "outputs": model(x).numpy().tolist(),
        "u": [[np.asarray(r).tolist() for r in strategy.experimental_local_results(v.value)] for v in states],
    }

print(json.dumps([trained(1), trained(2)]))
"""


@pytest.mark.slow
def test_two_replicas_are_as_one():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = json.loads(result.stdout.splitlines()[-1])
    for a, b in zip(one["weights"], two["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one["outputs"], two["outputs"], rtol=1e-5, atol=1e-6)
    for replicas in two["u"]:
        assert len(replicas) == 2
        np.testing.assert_array_equal(*replicas)
