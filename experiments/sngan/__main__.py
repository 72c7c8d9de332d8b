"""python -m experiments.sngan [--width=16] [--noise=32] [--features_epochs=20]"""

import json

import keras
import numpy as np
from absl import app, flags

import tfloop
from experiments.data import images
from experiments.sngan import frechet
from experiments.sngan.model import SNGAN
from experiments.sngan.picture import grids

FLAGS = flags.FLAGS
flags.DEFINE_integer("width", 16, "Filters of the narrowest convolution.", lower_bound=1)
flags.DEFINE_integer("noise", 32, "Numbers that a sample is made from.", lower_bound=1)
flags.DEFINE_integer("features_epochs", 20, "Epochs of the classifier whose features are compared.", lower_bound=1)
tfloop.binary.define_flags(epochs=80, batch_size=64, learning_rate=2e-3)


def main(argv):
    train, test = images(FLAGS.data, FLAGS.data_dir)
    classifier = frechet.classifier(train[0].shape[1:])
    classifier.compile(
        keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    tfloop.binary.train(classifier, *train, validation_data=test, epochs=FLAGS.features_epochs, name="features")

    gan = SNGAN(train[0].shape[1:], FLAGS.noise, FLAGS.width, FLAGS.learning_rate, FLAGS.seed)
    gan.compile(optimizer=None, jit_compile="step")  # both updates in one compiled step
    whole_batches = train[0][: max(1, len(train[0]) // FLAGS.batch_size) * FLAGS.batch_size]  # one shape to compile
    untrained = gan.samples(2000)
    run = tfloop.binary.train(gan, whole_batches, None, name="gan")

    generated = gan.samples(2000)
    real = frechet.features_of(classifier, train[0])
    compared = {"generated": generated, "held_out": test[0], "noise": noise_like(train[0]), "untrained": untrained}
    distances = {
        f"frechet_{n}": frechet.distance(real, frechet.features_of(classifier, x)) for n, x in compared.items()
    }
    for name, value in distances.items():
        print(f"{name:<18} {value:8.3f}")
    folder = tfloop.binary.folder()
    grids(folder / "samples.png", {"generated": generated[:100], "real": train[0][:100]})
    accuracy = classifier.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
    metrics = {**distances, "features_accuracy": accuracy, "steps": run.steps}
    (folder / "summary.json").write_text(json.dumps({"metrics": metrics}, indent=2) + "\n")


def noise_like(images, seed=0):
    """As many images whose pixels are drawn one by one, each from its values in the real ones."""
    return np.random.default_rng(seed).permuted(images, axis=0)


if __name__ == "__main__":
    app.run(main)
