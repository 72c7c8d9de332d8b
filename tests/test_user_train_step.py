"""A `train_step` written for `keras.Model` works unchanged, and logs what it logs there.

Each class below is written as in the documentation of Keras, for a `Base` that is `keras.Model` or `tfloop.Model`.
The same training runs on both. What is no metric object's result Keras shows as of the last batch; tfloop averages it.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfloop

RANDOM = np.random.RandomState(0)
X = RANDOM.normal(size=(10, 3)).astype("float32")
Y = RANDOM.normal(size=(10, 1)).astype("float32")
SIZES = [4, 4, 2]
MODES = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False, "steps_per_execution": 1},
    "three": {"jit_compile": False, "steps_per_execution": 3},
    "step": {"jit_compile": True},
    "loop": {"jit_compile": "loop"},
    "auto": {},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
some_modes = pytest.mark.parametrize(
    "mode", [MODES[m] for m in ("eager", "three", "auto")], ids=["eager", "three", "auto"]
)


class Batches(keras.callbacks.Callback):
    """Keeps the logs of every batch, and the size of each."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(dict(logs))

    def mean(self, name):
        """Of one epoch's raw values, by the sizes of the batches."""
        return float(np.average([logs[name] for logs in self.logs[-3:]], weights=SIZES))


def train(make, base, x=X, y=Y, epochs=2, callbacks=(), validate=False, **mode):
    """The history of the model that `make(base)` gives, trained from the same seed."""
    keras.utils.set_random_seed(1)
    model = make(base, **mode)
    validation = {"validation_data": (x, y) if y is not None else (x,), "validation_batch_size": 4} if validate else {}
    options = {"batch_size": 4, "epochs": epochs, "shuffle": False, "verbose": 0, **validation}
    return model.fit(x, y, callbacks=list(callbacks), **options).history


@functools.cache
def trained_by_keras(make, **options):
    """The history under Keras' own `fit`, and the logs of its batches."""
    batches = Batches()
    return train(make, keras.Model, callbacks=[batches], jit_compile=False, **options), batches


def assert_same_logs(make, mode, ignoring=(), **options):
    """tfloop logs what Keras logs (in whatever order), to 1e-5."""
    theirs, _ = trained_by_keras(make, **options)
    ours = train(make, tfloop.Model, **options, **mode)
    assert {n for n in ours if n.removeprefix("val_") not in ignoring} == set(theirs)
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


# The documentation's examples.


def documented(base, **options):
    """https://keras.io/guides/custom_train_step_in_tensorflow, "A first simple example"."""

    class CustomModel(base):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(y=y, y_pred=y_pred)
            trainable_vars = self.trainable_variables
            gradients = tape.gradient(loss, trainable_vars)
            self.optimizer.apply(gradients, trainable_vars)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(y, y_pred)
            return {m.name: m.result() for m in self.metrics}

    inputs = keras.Input((3,))
    outputs = layers.Dense(1, kernel_regularizer="l2", name="dense")(inputs)
    model = CustomModel(inputs, outputs)
    model.compile(optimizer="adam", loss="mse", metrics=["mae"], **options)
    return model


@every_mode
def test_the_documented_step_with_a_loop_over_metrics(mode):
    assert_same_logs(documented, mode, validate=True, ignoring=("compiled_loss", "other_losses"))


def test_batch_logs_of_the_documented_step_are_those_of_keras():
    """A callback that looks at every batch does not move the compiled loss tracker, which the step updates."""
    (_, theirs), ours = trained_by_keras(documented, validate=True), Batches()
    train(documented, tfloop.Model, callbacks=[ours])
    assert len(ours.logs) == len(theirs.logs) == 6
    for one, other in zip(ours.logs, theirs.logs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def lower_level(base, **options):
    """The same guide, "Going lower-level": trackers, a metrics property, sample weights, a test step."""

    class CustomModel(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss_tracker = keras.metrics.Mean(name="loss")
            self.mae_metric = keras.metrics.MeanAbsoluteError(name="mae")
            self.loss_fn = keras.losses.MeanSquaredError()

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.loss_fn(y, y_pred)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            self.loss_tracker.update_state(loss)
            self.mae_metric.update_state(y, y_pred)
            return {"loss": self.loss_tracker.result(), "mae": self.mae_metric.result()}

        def test_step(self, data):
            x, y = data
            y_pred = self(x, training=False)
            self.loss_tracker.update_state(10 * self.loss_fn(y, y_pred))
            self.mae_metric.update_state(y, y_pred)
            return {m.name: m.result() for m in self.metrics}

        @property
        def metrics(self):
            return [self.loss_tracker, self.mae_metric]

    inputs = keras.Input((3,))
    model = CustomModel(inputs, layers.Dense(1)(inputs))
    model.compile(optimizer=keras.optimizers.SGD(0.1), **options)
    return model


@every_mode
def test_the_documented_step_with_trackers_of_its_own(mode):
    assert_same_logs(lower_level, mode, validate=True)


class Sampling(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        mean, log_var = inputs
        return mean + ops.exp(0.5 * log_var) * keras.random.normal(ops.shape(mean), seed=self.seed_generator)


def vae(base, **options):
    """https://keras.io/examples/generative/vae."""

    class VAE(base):
        def __init__(self, encoder, decoder, **kwargs):
            super().__init__(**kwargs)
            self.encoder = encoder
            self.decoder = decoder
            self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
            self.reconstruction_loss_tracker = keras.metrics.Mean(name="reconstruction_loss")
            self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

        @property
        def metrics(self):
            return [self.total_loss_tracker, self.reconstruction_loss_tracker, self.kl_loss_tracker]

        def train_step(self, data):
            with tf.GradientTape() as tape:
                z_mean, z_log_var, z = self.encoder(data)
                reconstruction = self.decoder(z)
                reconstruction_loss = ops.mean(ops.sum(ops.square(data - reconstruction), axis=1))
                kl_loss = -0.5 * (1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var))
                kl_loss = ops.mean(ops.sum(kl_loss, axis=1))
                total_loss = reconstruction_loss + kl_loss
            grads = tape.gradient(total_loss, self.trainable_weights)
            self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
            self.total_loss_tracker.update_state(total_loss)
            self.reconstruction_loss_tracker.update_state(reconstruction_loss)
            self.kl_loss_tracker.update_state(kl_loss)
            return {
                "loss": self.total_loss_tracker.result(),
                "reconstruction_loss": self.reconstruction_loss_tracker.result(),
                "kl_loss": self.kl_loss_tracker.result(),
            }

    inputs = keras.Input((3,))
    mean, log_var = layers.Dense(2)(inputs), layers.Dense(2)(inputs)
    encoder = keras.Model(inputs, [mean, log_var, Sampling()([mean, log_var])])
    decoder = keras.Sequential([keras.Input((2,)), layers.Dense(3)])
    model = VAE(encoder, decoder)
    model.compile(optimizer=keras.optimizers.Adam(0.01), **options)
    return model


@some_modes
def test_the_documented_vae(mode):
    assert_same_logs(vae, mode, y=None)


def gan(base, **options):
    """https://keras.io/guides/custom_train_step_in_tensorflow, "Wrapping up: an end-to-end GAN example"."""

    class GAN(base):
        def __init__(self, discriminator, generator, latent_dim):
            super().__init__()
            self.discriminator = discriminator
            self.generator = generator
            self.latent_dim = latent_dim
            self.d_loss_tracker = keras.metrics.Mean(name="d_loss")
            self.g_loss_tracker = keras.metrics.Mean(name="g_loss")
            self.seed_generator = keras.random.SeedGenerator(1337)

        @property
        def metrics(self):
            return [self.d_loss_tracker, self.g_loss_tracker]

        def compile(self, d_optimizer, g_optimizer, loss_fn, **kwargs):
            super().compile(**kwargs)
            self.d_optimizer = d_optimizer
            self.g_optimizer = g_optimizer
            self.loss_fn = loss_fn

        def train_step(self, real_images):
            if isinstance(real_images, tuple):
                real_images = real_images[0]
            batch_size = ops.shape(real_images)[0]
            noise = keras.random.normal((batch_size, self.latent_dim), seed=self.seed_generator)
            generated_images = self.generator(noise)
            combined_images = ops.concatenate([generated_images, real_images], axis=0)
            labels = ops.concatenate([ops.ones((batch_size, 1)), ops.zeros((batch_size, 1))], axis=0)
            labels += 0.05 * keras.random.uniform(ops.shape(labels), seed=self.seed_generator)
            with tf.GradientTape() as tape:
                d_loss = self.loss_fn(labels, self.discriminator(combined_images))
            grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
            self.d_optimizer.apply_gradients(zip(grads, self.discriminator.trainable_weights, strict=True))
            noise = keras.random.normal((batch_size, self.latent_dim), seed=self.seed_generator)
            misleading_labels = ops.zeros((batch_size, 1))
            with tf.GradientTape() as tape:
                g_loss = self.loss_fn(misleading_labels, self.discriminator(self.generator(noise)))
            grads = tape.gradient(g_loss, self.generator.trainable_weights)
            self.g_optimizer.apply_gradients(zip(grads, self.generator.trainable_weights, strict=True))
            self.d_loss_tracker.update_state(d_loss)
            self.g_loss_tracker.update_state(g_loss)
            return {"d_loss": self.d_loss_tracker.result(), "g_loss": self.g_loss_tracker.result()}

    discriminator = keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="relu"), layers.Dense(1)])
    generator = keras.Sequential([keras.Input((2,)), layers.Dense(3)])
    model = GAN(discriminator, generator, latent_dim=2)
    model.compile(
        d_optimizer=keras.optimizers.Adam(0.01),
        g_optimizer=keras.optimizers.Adam(0.01),
        loss_fn=keras.losses.BinaryCrossentropy(from_logits=True),
        **options,
    )
    return model


@some_modes
def test_the_documented_gan_with_two_optimizers(mode):
    assert_same_logs(gan, mode, y=None)


def own_losses(base, **options):
    """The example of `keras.Model.compute_loss`, with a tracker, a reset and a metrics property of its own."""

    class MyModel(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss_tracker = keras.metrics.Mean(name="loss")

        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            loss = ops.mean((y_pred - y) ** 2)
            loss += ops.sum(self.losses)
            self.loss_tracker.update_state(loss)
            return loss

        def reset_metrics(self):
            self.loss_tracker.reset_state()

        @property
        def metrics(self):
            return [self.loss_tracker]

    inputs = keras.Input((3,))
    outputs = layers.Dense(1)(layers.ActivityRegularization(l1=0.1)(inputs))
    model = MyModel(inputs, outputs, name="mine")
    model.compile(optimizer="sgd", **options)
    return model


@some_modes
def test_the_documented_compute_loss(mode):
    """`loss` stays the loss, weighted by the batches' sizes; the tracker, which weighs them alike, stands beside it."""
    (theirs, _), ours = trained_by_keras(own_losses), train(own_losses, tfloop.Model, **mode)
    assert list(theirs) == ["loss"] and list(ours) == ["loss", "mine/loss"]
    assert ours["mine/loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["loss"] != pytest.approx(theirs["loss"], rel=1e-5)


def test_a_reset_of_one_s_own_does_not_keep_other_metrics_from_being_reset():
    keras.utils.set_random_seed(1)
    model = own_losses(tfloop.Model)
    model.hidden_mean = keras.metrics.Mean(name="seen")
    model.add_metric(lambda t: ops.mean(t["x"]), name="mean")
    seen = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: model.hidden_mean.update_state(1.0))
    model.fit(X, Y, epochs=3, verbose=0, callbacks=[seen])
    assert float(model.hidden_mean.count) == 1
    assert model.history.history["mean"] == pytest.approx([X.mean()] * 3, abs=1e-6)


def own_metrics(base, **options):
    """The example of `keras.Model.compute_metrics`: something more in the results."""

    class MyModel(base):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            metric_results = super().compute_metrics(x, y, y_pred, sample_weight)
            self.largest.update_state(ops.max(y_pred))
            return {**metric_results, "largest": self.largest.result()}

    inputs = keras.Input((3,))
    model = MyModel(inputs, layers.Dense(1)(inputs))
    model.largest = keras.metrics.Mean(name="largest")
    model.compile(optimizer="sgd", loss="mse", metrics=["mae"], **options)
    return model


@some_modes
def test_the_documented_compute_metrics(mode):
    assert_same_logs(own_metrics, mode, validate=True)


def extended(base, **options):
    class Extended(base):
        def train_step(self, data):
            return {**super().train_step(data), "extra": 2.0}

        def test_step(self, data):
            return {**super().test_step(data), "extra": 3.0}

    inputs = keras.Input((3,))
    model = Extended(inputs, layers.Dense(1, kernel_regularizer="l2")(inputs))
    model.compile("sgd", "mse", metrics=["mae"], **options)
    return model


@some_modes
def test_a_step_that_adds_to_what_the_model_s_own_returns(mode):
    assert_same_logs(extended, mode, validate=True, ignoring=("compiled_loss", "other_losses"))


def as_function(base, **options):
    class Function(base):
        @tf.function
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = ops.mean((self(x, training=True) - y) ** 2)
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            if loss > 5:  # what autograph is for
                loss = 2 * loss
            self.tracker.update_state(loss)
            return {"loss": self.tracker.result()}

        @property
        def metrics(self):
            return [self.tracker]

    inputs = keras.Input((3,))
    model = Function(inputs, layers.Dense(1, name="dense")(inputs))
    model.tracker = keras.metrics.Mean(name="loss")
    model.compile("sgd", **options)
    return model


@some_modes
def test_a_step_that_is_a_tf_function_is_a_part_of_the_step_around_it(mode):
    assert_same_logs(as_function, mode)
    model = as_function(tfloop.Model, **mode)
    model.watch("gradients/dense/kernel", "norm")
    assert "gradients/dense/kernel/norm" in model.fit(X, Y, batch_size=4, verbose=0).history


# Raw values.


def raw(base, **options):
    class Raw(base):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = ops.mean((self(x, training=True) - y) ** 2)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            self.seen.update_state(loss)
            return {
                "raw_loss": loss,
                "vector": ops.mean(x, axis=1),
                "number": 2.0,
                "tracked": self.seen.result(),
                "nested": {"a": 2 * loss, "deeper": {"b": 3 * loss}},
            }

    inputs = keras.Input((3,))
    model = Raw(inputs, layers.Dense(1, kernel_initializer="ones")(inputs))
    model.seen = keras.metrics.Mean(name="seen")
    model.compile(optimizer=keras.optimizers.SGD(0.1), **options)
    return model


@every_mode
def test_raw_values_are_averaged_over_the_epoch_and_results_are_not(mode):
    theirs, batches = trained_by_keras(raw, epochs=1)
    ours = train(raw, tfloop.Model, **mode, epochs=1)
    expected = {"raw_loss": batches.mean("raw_loss"), "number": 2.0, "tracked": theirs["tracked"][0]}
    expected |= {"a": batches.mean("a"), "b": batches.mean("b"), "vector": X.mean()}
    assert {name: values[0] for name, values in ours.items()} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_batch_logs_of_raw_values_are_running_averages():
    (_, theirs), ours = trained_by_keras(raw, epochs=1), Batches()
    train(raw, tfloop.Model, callbacks=[ours], epochs=1)
    values = [logs["raw_loss"] for logs in theirs.logs]
    running = [np.average(values[:n], weights=SIZES[:n]) for n in (1, 2, 3)]
    assert [logs["raw_loss"] for logs in ours.logs] == pytest.approx(running, rel=1e-5)
    assert [logs["tracked"] for logs in ours.logs] == pytest.approx([np.mean(values[:n]) for n in (1, 2, 3)], rel=1e-5)


def test_a_step_that_returns_no_dict_is_an_error():
    class Returns(tfloop.Model):
        def train_step(self, data):
            return self.returned

    model = Returns()
    for model.returned in ([1.0], "loss", 1.0):
        model.compile()
        with pytest.raises(TypeError, match="dict"):
            model.fit(X, Y, verbose=0)


# What the model has beside the user's step.


@every_mode
def test_the_registry_is_added_to_what_the_step_returns(mode):
    keras.utils.set_random_seed(1)
    model = documented(tfloop.Model, **mode)
    model.add_loss(lambda t: ops.mean(t["y_pred"] ** 2), name="size", weight=0.5)
    model.add_metric(lambda t: ops.mean(t["x"]), name="mean")
    model.add_metric(lambda t: t["losses/size"], name="again")
    model.watch("gradients/*/kernel", "norm")
    logs = model.fit(X, Y, batch_size=4, verbose=0).history
    assert list(logs) == ["loss", "mae", "size", "mean", "again", "gradients/dense/kernel/norm"]
    assert logs["mean"] == pytest.approx([X.mean()], abs=1e-6)
    assert logs["again"] == pytest.approx(logs["size"], rel=1e-6)


@every_mode
def test_registered_losses_train_through_a_user_s_step(mode):
    def weights(by_registry):
        keras.utils.set_random_seed(1)
        model = documented(tfloop.Model, **mode)
        if by_registry:
            model.add_loss(lambda t: 10 * ops.mean(t["y_pred"] ** 2))
        else:
            model.add_loss(10 * ops.mean(model.output**2))
        model.fit(X, Y, batch_size=4, verbose=0, shuffle=False)
        return model.get_weights()

    for one, other in zip(weights(True), weights(False), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_add_metric_in_the_step_itself():
    class Adds(tfloop.Model):
        def train_step(self, data):
            self.add_metric(ops.mean(data[0]), name="mean")
            return {}

    model = Adds()
    model.compile()
    assert model.fit(X, Y, batch_size=4, verbose=0).history["mean"] == pytest.approx([X.mean()], abs=1e-6)


def test_metrics_that_only_the_test_step_returns():
    """As in https://keras.io/examples/generative/ddim: a costly metric is measured in evaluation alone."""

    class DDIM(tfloop.Model):
        def __init__(self):
            super().__init__()
            self.network = layers.Dense(3)
            self.ema_network = layers.Dense(3)
            self.noise_loss_tracker = keras.metrics.Mean(name="n_loss")
            self.kid = keras.metrics.Mean(name="kid")

        @property
        def metrics(self):
            return [self.noise_loss_tracker, self.kid]

        def train_step(self, images):
            with tf.GradientTape() as tape:
                loss = ops.mean((self.network(images) - images) ** 2)
            gradients = tape.gradient(loss, self.network.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.network.trainable_weights, strict=True))
            self.noise_loss_tracker.update_state(loss)
            self.ema_network(images)
            for weight, ema_weight in zip(self.network.weights, self.ema_network.weights, strict=True):
                ema_weight.assign(0.5 * ema_weight + 0.5 * weight)
            return {m.name: m.result() for m in self.metrics[:-1]}

        def test_step(self, images):
            self.noise_loss_tracker.update_state(ops.mean((self.ema_network(images) - images) ** 2))
            self.kid.update_state(1.5)
            return {m.name: m.result() for m in self.metrics}

    model = DDIM()
    model.network.build((None, 3))
    model.ema_network.build((None, 3))
    model.compile(optimizer="adam")
    history = model.fit(X, None, batch_size=4, epochs=2, verbose=0, validation_data=(X,)).history
    assert list(history) == ["n_loss", "val_n_loss", "val_kid"]
    assert history["val_kid"] == [1.5, 1.5]


@pytest.mark.slow
def test_the_documented_gan_compiled_draws_the_same_random_numbers():
    assert_same_logs(gan, MODES["step"], y=None)


# Mixed precision, several optimizers.


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


def scaled(base, **options):
    """https://keras.io/api/mixed_precision: in one's own step the loss is scaled by hand, `apply` unscales."""

    class Scaled(base):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = 0.01 * self.compute_loss(y=y, y_pred=self(x, training=True))
                scaled_loss = self.optimizer.scale_loss(loss)
            gradients = tape.gradient(scaled_loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
            return {"loss": self.metrics[0].result()}

    inputs = keras.Input((3,))
    model = Scaled(inputs, layers.Dense(1, name="dense")(inputs))
    model.compile(optimizer=keras.optimizers.SGD(10.0), loss="mse", **options)
    return model


def test_a_step_that_scales_its_loss_in_mixed_float16(mixed_float16):
    theirs = train(scaled, keras.Model, jit_compile=False)
    ours = train(scaled, tfloop.Model)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_gradients_of_a_step_that_scales_its_loss_are_watched_unscaled(mixed_float16):
    keras.utils.set_random_seed(1)
    model = scaled(tfloop.Model)
    model.watch("gradients/*/kernel", "norm")
    before = model.get_weights()[0]
    logs = model.fit(X, Y, batch_size=10, verbose=0).history
    moved = np.linalg.norm(model.get_weights()[0] - before)
    assert logs["gradients/dense/kernel/norm"] == pytest.approx([moved / 10], rel=1e-3)


class TwoOptimizers(tfloop.Model):
    """Two nets, each with a loss and an optimizer of its own, by `minimize`."""

    def __init__(self, first, second):
        super().__init__()
        self.a = layers.Dense(1, kernel_initializer="ones")
        self.b = layers.Dense(1, kernel_initializer="ones")
        self.first, self.second = first, second

    def build(self, shape):
        self.a.build(shape)
        self.b.build(shape)
        self.built = True

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = 0.01 * ops.mean((ops.cast(self.a(x), "float32") - y) ** 2)
        norm = self.minimize(loss, self.a.trainable_variables, self.first, tape=tape)
        other = self.minimize(
            lambda: 0.01 * ops.mean((ops.cast(self.b(x), "float32") - y) ** 2), self.b.trainable_variables, self.second
        )
        return {"a_loss": loss, "a_norm": norm, "b_norm": other}


def two_optimizers(**mode):
    model = TwoOptimizers(keras.optimizers.SGD(10.0), keras.optimizers.SGD(10.0, clipnorm=0.005))
    model.build((None, 3))
    model.compile(**mode)
    return model


def gradient_at_the_start():
    """Of a hundredth of the mean squared error of a layer of ones: kernel and bias, by NumPy."""
    error = X.sum(1, keepdims=True) - Y
    return 0.01 * np.append(2 * (X * error).mean(0), 2 * error.mean())


def assert_one_update_each(model, logs, tolerance):
    gradient = gradient_at_the_start()
    norm = np.linalg.norm(gradient)
    assert [logs["a_norm"], logs["b_norm"]] == pytest.approx([norm, norm], rel=tolerance)
    start = np.array([1, 1, 1, 0], "float32")
    a, b = (np.append(net.kernel.numpy(), net.bias.numpy()) for net in (model.a, model.b))
    np.testing.assert_allclose(a, start - 10 * gradient, rtol=tolerance, atol=tolerance)
    clipped = [g * min(1, 0.005 / np.linalg.norm(g)) for g in (gradient[:3], gradient[3:])]  # each variable by itself
    np.testing.assert_allclose(b, start - 10 * np.concatenate(clipped), rtol=tolerance, atol=tolerance)


@some_modes
def test_minimize_with_two_optimizers_updates_each_once(mode):
    model = two_optimizers(**mode)
    logs = model.fit(X, Y, batch_size=10, verbose=0).history
    assert_one_update_each(model, {name: values[0] for name, values in logs.items()}, 1e-5)


@pytest.mark.parametrize("mode", [MODES["eager"], MODES["auto"], MODES["step"]], ids=["eager", "auto", "step"])
def test_minimize_in_mixed_float16_unscales_before_clipping_and_watching(mode, mixed_float16):
    model = two_optimizers(**mode)
    model.watch("gradients/a/kernel", "norm")
    logs = {name: values[0] for name, values in model.fit(X, Y, batch_size=10, verbose=0).history.items()}
    assert_one_update_each(model, logs, 2e-3)
    assert logs["gradients/a/kernel/norm"] == pytest.approx(np.linalg.norm(gradient_at_the_start()[:3]), rel=2e-3)


def test_minimize_in_mixed_float16_leaves_out_an_update_that_overflows(mixed_float16):
    model = two_optimizers()
    before = model.get_weights()
    model.fit(1e4 * X, Y, batch_size=10, verbose=0)
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_optimizers_of_minimize_count_and_keep_their_slots():
    model = TwoOptimizers(keras.optimizers.Adam(0.1), keras.optimizers.Adam(0.1))
    model.build((None, 3))
    model.compile()
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    assert [int(o.iterations.numpy()) for o in (model.first, model.second)] == [6, 6]


# Optimizers that change the loss or the gradients themselves.


class Signed(keras.optimizers.SGD):
    """Overrides `apply_gradients`, as optimizers written for tf.keras do."""

    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients([(ops.sign(g), v) for g, v in grads_and_vars])


class Scaling(keras.optimizers.SGD):
    """Scales the loss and unscales the gradients itself."""

    def scale_loss(self, loss):
        return 4.0 * loss

    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients([(g / 4.0, v) for g, v in grads_and_vars])


def with_optimizer(base, optimizer, **mode):
    inputs = keras.Input((3,))
    model = base(inputs, layers.Dense(1, name="dense")(inputs))
    model.compile(optimizer(), "mse", **mode)
    return model


def several():
    chosen = keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.1), {".*/bias": keras.optimizers.SGD(0.01)})
    return keras.optimizers.MultiOptimizer(chosen, loss_scale_factor=8.0)


OPTIMIZERS = {
    "apply_gradients": lambda: Signed(0.1),
    "scale_loss": lambda: Scaling(0.1),
    "loss_scale_factor": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=16.0, clipnorm=0.5),
    "dynamic": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    "several": several,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@some_modes
def test_optimizers_that_scale_or_change_gradients_do_what_they_do_under_keras(optimizer, mode):
    assert_same_logs(functools.partial(with_optimizer, optimizer=optimizer), mode)


@pytest.mark.parametrize("optimizer", ["scale_loss", "loss_scale_factor", "dynamic"])
def test_a_scaled_loss_gives_unscaled_gradients_to_those_who_watch(optimizer):
    def found(make):
        keras.utils.set_random_seed(1)
        model = with_optimizer(tfloop.Model, make)
        model.watch("gradients/dense/kernel", "norm")
        norm = model.minimize(lambda: model.compute_loss(y=Y, y_pred=model(X)), model.trainable_variables)
        return [float(norm), *model.fit(X, Y, batch_size=10, verbose=0).history["gradients/dense/kernel/norm"]]

    clipped = {"clipnorm": 0.5} if optimizer == "loss_scale_factor" else {}
    expected = found(lambda: keras.optimizers.SGD(0.1, **clipped))
    np.testing.assert_allclose(found(OPTIMIZERS[optimizer]), expected, rtol=1e-5)


def test_an_optimizer_that_shall_not_scale_the_loss_does_not(mixed_float16):
    optimizer = keras.optimizers.SGD(0.1, loss_scale_factor=8.0)
    model = with_optimizer(tfloop.Model, lambda: optimizer, auto_scale_loss=False)
    model.fit(X, Y, batch_size=10, verbose=0)
    assert model.optimizer is optimizer and optimizer.loss_scale_factor == 8.0


# Networks that several compiled models share.


def shared_networks(base):
    """The idiom of the first Keras GANs: the discriminator is frozen in the model that trains the generator."""
    keras.utils.set_random_seed(1)
    z = keras.Input((2,))
    generator = base(z, layers.Dense(3)(z), name="generator")
    inputs = keras.Input((3,))
    discriminator = base(inputs, layers.Dense(1)(inputs), name="discriminator")
    discriminator.compile(keras.optimizers.SGD(0.1), "mse")
    discriminator.trainable = False
    both = base(z, discriminator(generator(z)))
    both.compile(keras.optimizers.SGD(0.1), "mse")
    return generator, discriminator, both


def test_networks_shared_by_two_models_train_as_compiled():
    generator, discriminator, both = shared_networks(tfloop.Model)
    g, d = generator.get_weights(), discriminator.get_weights()
    both.train_on_batch(X[:, :2], Y)
    assert changed(generator, g) and not changed(discriminator, d)
    g = generator.get_weights()
    discriminator.train_on_batch(X, Y)
    assert changed(discriminator, d) and not changed(generator, g)
    assert not discriminator.trainable  # the flag is as the user left it


def test_networks_shared_by_two_models_train_as_compiled_in_fit():
    _, discriminator, both = shared_networks(tfloop.Model)
    d = discriminator.get_weights()
    both.fit(X[:, :2], Y, epochs=2, verbose=0)
    assert not changed(discriminator, d)
    discriminator.fit(X, Y, epochs=2, verbose=0)
    assert changed(discriminator, d)


def changed(model, before):
    return any(np.any(one != other) for one, other in zip(model.get_weights(), before, strict=True))


def triplets(base):
    class Siamese(base):
        """Called with three inputs, as in Keras' example of a siamese network."""

        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2, kernel_initializer="ones")
            self.made = keras.Variable(0.0, trainable=False, name="made")

        def call(self, inputs):
            anchor, positive, negative = (self.dense(x) for x in inputs)
            return ops.sum((anchor - positive) ** 2, -1) - ops.sum((anchor - negative) ** 2, -1)

        def distance(self, data):
            return ops.mean(ops.maximum(self(data) + 0.5, 0.0))

        def train_step(self, data):
            self.made.assign_add(1.0)
            with tf.GradientTape() as tape:
                loss = self.distance(data)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"error": loss}

        def test_step(self, data):
            return {"error": self.distance(data)}

    return Siamese(), (X, X + 0.1, X[::-1].copy())


def pairs(base):
    class Pairs(of_one_layer(base)):
        def call(self, inputs):
            a, b = inputs
            return self.dense(a) - self.dense(2 * b)

        def train_step(self, data):
            (a, b), y, weight, _ = data["a"], data["y"], data["w"], data["rest"]
            with tf.GradientTape() as tape:
                loss = ops.mean(weight * (self((a, b), training=True) - y) ** 2)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"error": loss}

        def test_step(self, data):
            return {"error": ops.mean((self(data["a"]) - data["y"]) ** 2)}

    return Pairs(), {"a": (X, X[:, ::-1].copy()), "y": Y[:, :1], "w": np.ones((len(X), 1), "float32"), "rest": X}


def of_one_layer(base):
    class OneLayer(base):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1, kernel_initializer="ones")

        def call(self, x):
            return self.dense(x)

    return OneLayer


def adapting(adapt, data):
    """A model whose steps make `(x, y)` of the batch and leave the rest to Keras."""

    def make(base):
        class Adapting(of_one_layer(base)):
            def train_step(self, data):
                return super().train_step(adapt(*data))

            def test_step(self, data):
                return super().test_step(adapt(*data))

        return Adapting(), data

    return make


KINDS = {
    "triplets": triplets,
    "a dict": pairs,
    "four parts": adapting(lambda a, b, c, d: (ops.concatenate([a, b], -1), c + 0 * d), (X, X, Y[:, :1], Y[:, :1])),
    "reshaped": adapting(lambda x, y, _=None: (ops.repeat(x, 2, -1), y), (X, Y[:, :1])),
}
# `train_on_batch` takes x, y and sample weights.
FIRST = [(kind, first) for kind in KINDS for first in ("fit", "evaluate")]
FIRST += [(kind, "train_on_batch") for kind in ("triplets", "reshaped")]


@some_modes
@pytest.mark.parametrize(("kind", "first"), FIRST)
def test_only_a_step_of_one_s_own_knows_what_it_calls_the_model_with(kind, first, mode):
    """A model that is not built is built by that step, as in Keras; and what that step did is taken back."""
    found = []
    for base in (keras.Model, tfloop.Model):
        model, data = KINDS[kind](base)
        model.compile(keras.optimizers.Adam(0.01), "mse", **(mode if base is tfloop.Model else {}))
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(len(X))
        logs = []
        if first == "evaluate":
            logs.append(model.evaluate(dataset, verbose=0))
        if first == "train_on_batch":
            batch = next(iter(dataset))
            logs.append(model.train_on_batch(*(batch if isinstance(batch, tuple) else (batch,))))
        (values,) = model.fit(dataset, epochs=3, verbose=0).history.values()
        logs += [values, model.evaluate(dataset, verbose=0)]
        logs.append(model.optimizer.iterations.numpy())
        found.append(np.concatenate([np.ravel(v) for v in (*logs, *model.get_weights())]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def updated_late(base, **options):
    """A metric updated after Keras' own step has gathered the results; and one after the user's has."""

    class Late(base):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)
            self.target = keras.metrics.Mean(name="target")

        def call(self, x):
            return self.dense(x)

        def train_step(self, data):
            logs = super().train_step(data)
            self.target.update_state(data[1])
            return logs

        def test_step(self, data):
            self.compute_loss(y=data[1], y_pred=self(data[0], training=False))
            logs = {m.name: m.result() for m in self.metrics}
            self.target.update_state(10 * data[1])
            return logs

    model = Late()
    model.compile("sgd", "mse", **options)
    return model


@some_modes
def test_a_metric_may_be_updated_after_its_result_was_taken(mode):
    history = train(updated_late, tfloop.Model, validate=True, **mode)
    assert history["target"] == pytest.approx([Y.mean()] * 2, rel=1e-5)
    assert_same_logs(updated_late, mode)
    assert history["val_target"] == pytest.approx([10 * Y.mean()] * 2, rel=1e-5)


@some_modes
def test_a_model_that_only_its_step_builds_is_watched_and_averaged(mode):
    model, data = triplets(tfloop.Model)
    model.compile(keras.optimizers.SGD(0.1), **mode)
    model.watch("gradients/dense/kernel", "norm")
    average = tfloop.WeightAverage()
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(len(X))
    logs = model.fit(dataset, epochs=3, verbose=0, callbacks=[average]).history
    assert len(logs["gradients/dense/kernel/norm"]) == 3 and int(average.count.numpy()) == 3
    assert float(model.made.numpy()) == 3


@some_modes
@pytest.mark.parametrize("by", ["minimize", "apply"])
def test_variables_that_a_step_takes_before_it_calls_the_model_are_trained(by, mode):
    class Early(of_one_layer(tfloop.Model)):
        def train_step(self, data):
            x, y = data
            variables = self.trainable_variables
            with tf.GradientTape() as tape:
                loss = ops.mean((self(x, training=True) - y) ** 2)
            if by == "minimize":
                self.minimize(loss, variables, tape=tape)
            else:
                self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    model = Early()
    model.compile(keras.optimizers.SGD(0.1), **mode)
    model.fit(X, Y[:, :1], batch_size=len(X), verbose=0)
    residual = X.sum(1, keepdims=True) - Y[:, :1]
    expected = 1 - 0.1 * 2 * np.mean(X * residual, 0, keepdims=True).T
    np.testing.assert_allclose(model.dense.kernel, expected, rtol=1e-5)
