"""python -m experiments.vae [--latent=2] [--warmup=1000]"""

import keras
from absl import app, flags

import tfloop
from experiments.data import images
from experiments.vae.model import VAE
from experiments.vae.picture import latent_plane

FLAGS = flags.FLAGS
flags.DEFINE_integer("latent", 2, "Dimensions of z.", lower_bound=2)
flags.DEFINE_integer("warmup", 1000, "Updates in which the weight of the KL term rises from 0 to 1.", lower_bound=1)
tfloop.binary.define_flags(epochs=200, batch_size=64)


def main(argv):
    (x, _), (x_test, y_test) = images(FLAGS.data, FLAGS.data_dir)
    model = VAE(x.shape[1:], FLAGS.latent, warmup=FLAGS.warmup)
    model.compile(keras.optimizers.Adam(FLAGS.learning_rate))
    run = tfloop.binary.train(model, x, None, validation_data=(x_test, None))
    latent_plane(run.path("latent_plane.png"), model, x_test, y_test)


if __name__ == "__main__":
    app.run(main)
