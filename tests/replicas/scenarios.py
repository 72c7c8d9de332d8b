"""Programs trained on one device and on two replicas, in a process that has two logical devices.

python scenarios.py [NAME ...]      prints what each measured, as one line of JSON.

The batches are not divided evenly (70 examples in batches of 23: parts of 12 and 11, and at last a batch of one).
"""

import concurrent.futures
import json
import os
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

import tfloop

RNG = np.random.default_rng(0)
X = RNG.normal(size=(70, 5)).astype("float32")
Y = RNG.integers(0, 3, 70)
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def dense(**compiled):
    inputs = keras.Input((5,))
    hidden = layers.Dense(4, name="code")(layers.Dense(7, activation="relu", name="hidden")(inputs))
    model = tfloop.Model(inputs, layers.Dense(3, name="logits")(hidden))
    compiled = {"optimizer": keras.optimizers.Adam(0.01), "loss": crossentropy(), **compiled}
    model.compile(**{"jit_compile": False, **compiled})
    return model


def fitted(model, data=None, **arguments):
    data = data or (X, Y)
    if len(data) == 2:
        arguments = {"batch_size": 23, "validation_data": (X[:9], Y[:9]), **arguments}
    history = model.fit(*data, **{"epochs": 3, "verbose": 0, **arguments}).history
    return {"history": history, "weights": arrays(model)}


def arrays(model):
    return {name: value.tolist() for name, value in state(model).items()}


def state(model):
    found = tfloop.reproducibility.snapshot(tfloop.reproducibility.state_variables(model))
    return {n: v for n, v in found.items() if v.dtype.kind == "f" and not n.startswith("optimizer/learning_rate")}


def batches(drop=False):
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(23, drop_remainder=drop)


@scenario
def terms():
    model = dense(optimizer=keras.optimizers.Adam(0.01, clipnorm=0.3), metrics=["accuracy"])
    model.add_loss(lambda t: 0.1 * ops.mean(t["hidden"] ** 2), name="small")
    model.add_loss(lambda t: t["code"] ** 2, name="many", weight=0.01)
    model.add_metric(lambda t: t["code"], name="mean")
    model.add_metric(lambda t: t["code"], name="sum", aggregation="sum")
    model.add_metric(lambda t: t["code"], name="max", aggregation="max")
    model.add_metric(lambda t: t["code"], name="min", aggregation="min")
    model.watch("gradients/*", "norm")
    model.watch("updates/*", "norm", every=2)
    model.watch("code", "abs_mean")
    return fitted(model)


@scenario
def eagerly():
    return fitted(dense(run_eagerly=True, metrics=["accuracy"]))


@scenario
def dataset_of_unknown_size():
    return fitted(dense(metrics=["accuracy"]), (batches(),))


@scenario
def dataset():
    return fitted(dense(metrics=["accuracy"]), (batches(drop=True),))


@scenario
def generator():
    return fitted(dense(metrics=["accuracy"]), (((X[i : i + 10], Y[i : i + 10]) for i in range(0, 70, 10)),), epochs=1)


@scenario
def sample_weights():
    weights = np.linspace(0.5, 2, 70).astype("float32")
    return fitted(dense(weighted_metrics=["accuracy"]), sample_weight=weights, batch_size=14)


@scenario
def clipped_globally():
    return fitted(dense(optimizer=keras.optimizers.SGD(0.1, global_clipnorm=0.05)))


@scenario
def accumulated():
    """The last update is of a batch of 23 and one of a single example."""
    model = dense(accumulate=2, metrics=["accuracy"])
    model.watch("gradients/*", "norm")
    return fitted(model, batch_size=23)


@scenario
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return fitted(dense())
    finally:
        keras.config.set_dtype_policy("float32")


@scenario
def embedding():
    inputs = keras.Input((4,), dtype="int32")
    model = tfloop.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.Embedding(20, 3)(inputs))))
    model.compile(keras.optimizers.SGD(0.5), crossentropy(), jit_compile=False)
    model.watch("gradients/*", "norm")
    with tempfile.TemporaryDirectory() as folder:  # guarded
        run = tfloop.Run(folder, log=())
        history = run.fit(model, RNG_IDS, Y, batch_size=23, epochs=2, verbose=0).history
    return {"history": history, "weights": arrays(model)}


RNG_IDS = np.random.default_rng(1).integers(0, 20, (70, 4))


@scenario
def optimizer_average():
    return fitted(dense(optimizer=keras.optimizers.AdamW(0.01, use_ema=True, ema_overwrite_frequency=2)))


@scenario
def optimizer_accumulates():
    return fitted(dense(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)))


@scenario
def synchronized_batch_norm():
    return fitted(with_batch_norm(True), batch_size=14)


@scenario
def synchronized_batch_norm_of_uneven_parts():
    return fitted(with_batch_norm(True), batch_size=23)


@scenario
def added_losses_around_a_synchronization():
    """Replicas change places in the middle of the model."""

    class Model(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.hidden = layers.Dense(7, activity_regularizer=keras.regularizers.L2(0.1))
            self.norm, self.logits = layers.BatchNormalization(synchronized=True), layers.Dense(3)

        def call(self, x, training=False):
            h = self.hidden(x)
            self.add_loss(0.1 * ops.mean(h**2), name="before")
            h = self.norm(h, training=training)
            self.add_loss(0.1 * ops.mean(ops.abs(h)), name="after")
            return self.logits(h)

    model = Model()
    model.compile(keras.optimizers.SGD(0.1), crossentropy(), jit_compile=False)
    return fitted(model)


@scenario
def masked():
    inputs = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(9, 4, mask_zero=True)(inputs)
    model = tfloop.Model(inputs, layers.Dense(3)(layers.LSTM(5, return_sequences=True)(hidden)))
    model.compile(keras.optimizers.SGD(0.1), crossentropy(), jit_compile=False)
    rng = np.random.default_rng(2)
    ids = rng.integers(1, 9, (70, 6)) * (np.arange(6) < rng.integers(1, 7, (70, 1)))
    return fitted(model, (ids, rng.integers(0, 3, (70, 6))), validation_data=(ids[:9], ids[:9] % 3))


def with_loss(**options):
    def run():
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)
        return fitted(dense(loss=loss, optimizer=keras.optimizers.SGD(0.01)), sample_weight=np.linspace(0, 2, 70))

    return run


SCENARIOS["summed"] = with_loss(reduction="sum")
SCENARIOS["mean_of_weights"] = with_loss(reduction="mean_with_sample_weight")
SCENARIOS["ignored_class"] = with_loss(ignore_class=0)


@scenario
def batch_norm():
    """One step on 14 examples, that leaves the weights as they are."""
    layer = layers.BatchNormalization(momentum=0.9)
    inputs = keras.Input((3,))
    model = tfloop.Model(inputs, layers.Dense(1)(layer(inputs)))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    model.fit(X[:14, :3], X[:14, 3], batch_size=14, shuffle=False, verbose=0)
    found = {"mean": layer.moving_mean, "variance": layer.moving_variance}
    copies = {n: [c.numpy().tolist() for c in getattr(v.value, "values", [v.value])] for n, v in found.items()}
    return {"inputs": X[:14, :3].tolist(), **copies}


def with_batch_norm(synchronized):
    inputs = keras.Input((5,))
    hidden = layers.BatchNormalization(synchronized=synchronized)(layers.Dense(7)(inputs))
    model = tfloop.Model(inputs, layers.Dense(3)(hidden))
    model.compile(keras.optimizers.SGD(0.1), crossentropy(), jit_compile=False)
    return model


@scenario
def spectral_norm():
    inputs = keras.Input((5,))
    hidden = tfloop.SpectralNormalization(layers.Dense(7))(inputs)
    model = tfloop.Model(inputs, layers.Dense(3)(hidden))
    model.compile(keras.optimizers.SGD(0.1), crossentropy(), jit_compile=False)
    return fitted(model)


@scenario
def weight_average():
    return fitted(dense(), callbacks=[tfloop.WeightAverage("ema", start=2, every=2, decay=0.8)])


@scenario
def skipped():
    """An example that is not finite, on one of the replicas: none of them moves."""
    x = X.copy()
    x[30] = np.nan
    model = dense(metrics=["accuracy"])
    with tempfile.TemporaryDirectory() as folder:
        run = tfloop.Run(folder, on_nan="skip", log=())
        history = run.fit(model, x, Y, batch_size=10, epochs=2, verbose=0).history
        summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["skipped_steps"] == 2
    return {"history": history, "weights": arrays(model), "steps": summary["steps"]}


class KerasStyle(tfloop.Model):
    """As the Keras documentation writes a training step."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(7, activation="relu", kernel_regularizer="l2")
        self.logits = layers.Dense(3)
        self.seen = keras.metrics.Mean(name="seen")

    def call(self, x):
        return self.logits(self.hidden(x))

    def loss_of(self, x, y):
        return self.compute_loss(x=x, y=y, y_pred=self(x, training=True))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.seen.update_state(ops.mean(x**2, axis=1))
        return {"loss": loss, "seen": self.seen.result()}


class Naive(KerasStyle):
    """A mean that knows nothing of replicas: twice too large on two of them under Keras."""

    def loss_of(self, x, y):
        return tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, self(x), from_logits=True))


class Careful(KerasStyle):
    """As TensorFlow's guide to distribution writes it."""

    size = None

    def loss_of(self, x, y):
        losses = keras.losses.sparse_categorical_crossentropy(y, self(x), from_logits=True)
        return tf.nn.compute_average_loss(losses, global_batch_size=self.size) + tf.nn.scale_regularization_loss(
            self.losses[0]
        )


class Constant(Careful):
    size = 14


class Minimized(KerasStyle):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = ops.mean(keras.losses.sparse_categorical_crossentropy(y, self(x), from_logits=True))
        norm = self.minimize(loss, self.trainable_variables, tape=tape)
        return {"loss": loss, "norm": norm}


def own_step(cls, batch_size=14):
    def run():
        model = cls()
        model.compile(keras.optimizers.SGD(0.1), crossentropy(), jit_compile=False)
        return fitted(model, batch_size=batch_size, validation_data=None)

    return run


for cls in (Constant, Careful):
    SCENARIOS[f"{cls.__name__}_uneven"] = own_step(cls, 23)


for cls in (KerasStyle, Naive, Careful, Constant, Minimized):
    SCENARIOS[cls.__name__] = own_step(cls)


class TwoOptimizers(tfloop.Model):
    def __init__(self):
        super().__init__()
        self.generator, self.critic = layers.Dense(5), layers.Dense(1)

    def compile(self, one, other):
        super().compile(jit_compile=False)
        self.one, self.other = one, other

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = ops.mean(self.critic(data)) - ops.mean(self.critic(self.generator(data)))
        self.minimize(loss, self.critic.trainable_variables, self.other, tape=tape)
        with tf.GradientTape() as tape:
            score = ops.mean(self.critic(self.generator(data)) ** 2)
        self.minimize(score, self.generator.trainable_variables, self.one, tape=tape)
        return {"critic": loss, "generator": score}

    def call(self, x):
        return self.critic(self.generator(x))


@scenario
def two_optimizers():
    model = TwoOptimizers()
    model.compile(keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.01))
    return fitted(model, (X,), batch_size=23)


class Noisy(tfloop.Model):
    """What its layers draw can be seen in its metrics."""

    def __init__(self):
        super().__init__()
        self.noise, self.dropout = layers.GaussianNoise(1.0), layers.Dropout(0.5)
        self.logits = layers.Dense(3)

    def call(self, x, training=False):
        drawn = self.noise(0 * x, training=training)
        kept = self.dropout(0 * x + 1, training=training)
        free = keras.random.normal(ops.shape(x))
        for name, value in (("noise", drawn), ("dropout", kept), ("free", free)):
            self.add_metric(value[0, 0], name=f"{name}_max", aggregation="max")
            self.add_metric(value[0, 0], name=f"{name}_min", aggregation="min")
            self.add_metric(ops.mean(value), name=f"{name}_mean")
        return self.logits(x + drawn)


@scenario
def random_numbers():
    model = Noisy()
    model.compile(keras.optimizers.SGD(0.1), crossentropy(), jit_compile=False)
    return fitted(model, batch_size=70, validation_data=None)


@scenario
def random_numbers_eagerly():
    model = Noisy()
    model.compile(keras.optimizers.SGD(0.1), crossentropy(), run_eagerly=True)
    return fitted(model, batch_size=70, validation_data=None)


@scenario
def single_batches():
    model = dense(metrics=["accuracy"])
    trained = {i: model.train_on_batch(X[:9], Y[:9], return_dict=True) for i in range(3)}
    tested = model.test_on_batch(X[:7], Y[:7], return_dict=True)
    evaluated = model.evaluate(X, Y, batch_size=23, verbose=0, return_dict=True)
    predicted = model.predict(X[:9], verbose=0).tolist()
    return {"trained": trained, "tested": tested, "evaluated": evaluated, "predicted": predicted}


@scenario
def one_replica():
    """A strategy of a single device is no special case."""
    made = [tf.distribute.MirroredStrategy(["CPU:0"]), tf.distribute.OneDeviceStrategy("CPU:1")]
    if not tf.distribute.has_strategy():
        made = [tf.distribute.get_strategy() for _ in made]
    return {str(i): outside(lambda s=s: within(s)) for i, s in enumerate(made)}


def within(strategy):
    tfloop.set_seed(0)
    with strategy.scope():
        model = dense(metrics=["accuracy"])
    return fitted(model)


@scenario
def averages():
    """What is done to a trained model."""
    inputs = keras.Input((5,))
    hidden = layers.BatchNormalization(synchronized=True)(layers.Dense(7)(inputs))
    model = tfloop.Model(inputs, layers.Dense(3)(hidden))
    model.compile(keras.optimizers.SGD(0.1), crossentropy(), jit_compile=False)
    fitted(model, callbacks=[tfloop.WeightAverage("swa", start=2)], batch_size=14)
    before = arrays(model)
    with tfloop.averaged(model):
        tfloop.reestimate_batch_norm(model, X[:66].reshape(-1, 5))
        predicted = model.predict(X, verbose=0).tolist()
        averaged = arrays(model)
    assert arrays(model) == before
    return {"predicted": predicted, "averaged": averaged, "after": before}


@scenario
def refusals():
    """What is said against what cannot be, within a strategy's scope. A scope is a thread's: another one is outside."""
    if not tf.distribute.has_strategy():
        return {}
    model, optimizer = outside(dense), outside(keras.optimizers.Adam)
    return {
        "model": error_of(lambda: fitted(model)),
        "optimizer": error_of(lambda: fitted(dense(optimizer=optimizer))),
        "jit": error_of(lambda: fitted(dense(jit_compile=True))),
        "strategy": outside(central_storage),
        "keras": outside(keras_distribution),
    }


def outside(function):
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


def error_of(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing"


def central_storage():
    with tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"]).scope():
        return error_of(lambda: fitted(dense()))


def keras_distribution():
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"]))
    return error_of(lambda: fitted(dense()))


def main(arguments):
    devices = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(devices, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    results = {}
    for name in arguments or SCENARIOS:
        keras.backend.clear_session()
        tfloop.set_seed(0)
        one = SCENARIOS[name]()
        keras.backend.clear_session()
        tfloop.set_seed(0)
        with strategy.scope():
            two = SCENARIOS[name]()
        results[name] = {"one": one, "two": two}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
