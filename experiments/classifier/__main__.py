"""python -m experiments.classifier [--watch='gradients/*/kernel=norm'] [--parametrize='*/kernel=spectral_norm']"""

import keras
from absl import app, flags

import tfloop
from experiments.classifier.model import Classifier
from experiments.data import images

FLAGS = flags.FLAGS
flags.DEFINE_integer("units", 100, "Units of the hidden layer.", lower_bound=1)
tfloop.binary.define_flags(epochs=40, batch_size=32)


def main(argv):
    train, validation = images(FLAGS.data, FLAGS.data_dir)
    model = Classifier(FLAGS.units)
    model.compile(
        keras.optimizers.Adam(FLAGS.learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    tfloop.binary.train(model, *train, validation_data=validation)


if __name__ == "__main__":
    app.run(main)
