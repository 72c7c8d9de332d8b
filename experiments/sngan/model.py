"""A GAN with spectral norm in both nets and two optimizers in one step (Miyato et al. 2018, arXiv:1802.05957).

Images are (n, height, width, channels) in 0 .. 1, with sides that are multiples of four.
"""

import keras
import tensorflow as tf
from keras import layers, ops

import tfloop


class SNGAN(tfloop.Model):
    """Both nets, each with its optimizer. `call` scores images, `samples` makes them."""

    def __init__(self, image_shape=(8, 8, 1), noise=32, width=16, learning_rate=1e-3, seed=0):
        super().__init__()
        self.noise = noise
        self.generator = generator(image_shape, noise, width)
        self.discriminator = discriminator(image_shape, width)
        self.generator_optimizer = keras.optimizers.Adam(learning_rate, beta_1=0.0, beta_2=0.9)
        self.discriminator_optimizer = keras.optimizers.Adam(learning_rate, beta_1=0.0, beta_2=0.9)
        # Built here, so that a run finds their moments in its checkpoint when it goes on.
        self.generator_optimizer.build(self.generator.trainable_variables)
        self.discriminator_optimizer.build(self.discriminator.trainable_variables)
        self.draws = keras.random.SeedGenerator(seed)

    def call(self, images):
        return self.discriminator(images)

    def train_step(self, images):
        images = keras.utils.unpack_x_y_sample_weight(images)[0]
        noise = keras.random.normal((2, ops.shape(images)[0], self.noise), seed=self.draws)
        fakes = self.generator(noise[0], training=True)
        with tf.GradientTape() as tape:
            real, fake = self.discriminator(images, training=True), self.discriminator(fakes, training=True)
            discriminator_loss = ops.mean(ops.relu(1 - real)) + ops.mean(ops.relu(1 + fake))
        self.minimize(
            discriminator_loss, self.discriminator.trainable_variables, self.discriminator_optimizer, tape=tape
        )
        with tf.GradientTape() as tape:
            fakes = self.generator(noise[1], training=True)
            generator_loss = -ops.mean(self.discriminator(fakes, training=True))
        self.minimize(generator_loss, self.generator.trainable_variables, self.generator_optimizer, tape=tape)
        return {
            "discriminator_loss": discriminator_loss,
            "generator_loss": generator_loss,
            "real": ops.mean(real),
            "fake": ops.mean(fake),
        }

    def samples(self, count, seed=1):
        """`count` images, the same for the same seed."""
        noise = keras.random.normal((count, self.noise), seed=seed)
        return ops.convert_to_numpy(self.generator(noise, training=False))


def generator(image_shape, noise, width):
    height, wide, channels = image_shape
    height, wide = height // 4, wide // 4
    x = z = keras.Input((noise,), name="noise")
    x = layers.Dense(height * wide * 4 * width, use_bias=False, name="start")(x)
    x = layers.Reshape((height, wide, 4 * width))(x)
    x = layers.ReLU()(layers.BatchNormalization(name="start_norm")(x))
    for i, filters in enumerate((2 * width, width)):
        x = layers.Conv2DTranspose(filters, 4, 2, "same", use_bias=False, name=f"up_{i}")(x)
        x = layers.ReLU()(layers.BatchNormalization(name=f"norm_{i}")(x))
    pixels = layers.Conv2D(channels, 3, padding="same", activation="sigmoid", dtype="float32", name="pixels")(x)
    model = tfloop.Model(z, pixels, name="generator")
    model.parametrize("kernel", tfloop.SpectralNorm())
    return model


def discriminator(image_shape, width):
    x = images = keras.Input(image_shape, name="images")
    x = layers.Rescaling(2.0, -1.0)(x)
    for i, (filters, strides) in enumerate(((width, 1), (2 * width, 2), (4 * width, 2))):
        conv = layers.Conv2D(filters, 3 if strides == 1 else 4, strides, "same", name=f"conv_{i}")
        x = layers.LeakyReLU(0.1)(tfloop.SpectralNormalization(conv, name=f"normalised_{i}")(x))
    score = tfloop.SpectralNormalization(layers.Dense(1, dtype="float32", name="score"), name="normalised_score")
    return keras.Model(images, score(layers.Flatten()(x)), name="discriminator")
