"""The variational autoencoder of Kingma and Welling (2014), arXiv:1312.6114."""

import keras
import tensorflow as tf
from keras import layers, ops

import tfloop


class VAE(tfloop.Model):
    """Images (n, height, width, channels) in 0 .. 1 to the logits of their reconstructions.

    z is drawn in evaluation too, so that the two losses, in nats an image, add up to the negative evidence
    lower bound there as well:

        reconstruction = E_q(z|x) [-log p(x|z)]        p: Bernoulli in every pixel
        kl             = KL(q(z|x) || N(0, 1))         weighted by min(1, step / warmup)
    """

    def __init__(self, image_shape, latent=2, units=128, warmup=1000):
        super().__init__()
        self.latent = latent
        self.warmup = warmup
        self.seed = keras.random.SeedGenerator(0)
        self.encoder = keras.Sequential(
            [
                layers.Flatten(),
                layers.Dense(units, activation="relu"),
                layers.Dense(units, activation="relu"),
                layers.Dense(2 * latent, name="moments"),
            ]
        )
        self.decoder = keras.Sequential(
            [
                keras.Input((latent,)),
                layers.Dense(units, activation="relu"),
                layers.Dense(units, activation="relu"),
                layers.Dense(ops.prod(image_shape).numpy().item(), name="pixels"),
                layers.Reshape(image_shape),
            ]
        )

    def call(self, images):
        mean, log_variance = self.encode(images)
        noise = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=self.seed)
        z = mean + ops.exp(log_variance / 2) * noise
        logits = ops.cast(self.decoder(tfloop.tag(z, "z")), "float32")

        reconstruction = tf.nn.sigmoid_cross_entropy_with_logits(ops.cast(images, "float32"), logits)
        mean, log_variance = ops.cast(mean, "float32"), ops.cast(log_variance, "float32")
        kl = (mean**2 + ops.exp(log_variance) - 1.0 - log_variance) / 2
        self.add_loss(ops.mean(ops.sum(reconstruction, (1, 2, 3))), name="reconstruction")
        self.add_loss(ops.mean(ops.sum(kl, -1)), name="kl", weight=self.kl_weight)
        self.add_metric(ops.mean(ops.sum(kl, -1)), name="kl_unweighted")
        return logits

    def kl_weight(self, step):
        """Rises to 1: a decoder that knows nothing yet would have z say nothing, for good."""
        return ops.minimum(1.0, ops.cast(step, "float32") / self.warmup)

    def encode(self, images):
        """Mean and log variance of q(z|x), each (n, latent)."""
        return ops.split(self.encoder(images), 2, axis=-1)

    def decode(self, z):
        """Images (n, height, width, channels) in 0 .. 1 of points (n, latent)."""
        return ops.sigmoid(self.decoder(z))
