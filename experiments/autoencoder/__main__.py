"""python -m experiments.autoencoder [--code=16] [--data=mnist]"""

import keras
from absl import app, flags

import tfloop
from experiments.autoencoder.model import build
from experiments.autoencoder.picture import reconstructions
from experiments.data import images

FLAGS = flags.FLAGS
flags.DEFINE_integer("code", 16, "Numbers in the middle.", lower_bound=1)
tfloop.binary.define_flags(epochs=60, batch_size=64, learning_rate=3e-3)


def main(argv):
    (x, _), (x_test, _) = images(FLAGS.data, FLAGS.data_dir)
    model = build(x.shape[1:], code=FLAGS.code)
    model.compile(keras.optimizers.Adam(FLAGS.learning_rate))
    run = tfloop.binary.train(model, x, None, validation_data=(x_test, None))
    reconstructions(run.path("reconstructions.png"), model, x_test)


if __name__ == "__main__":
    app.run(main)
