"""python -m experiments.averaging [--kind=swa|ema] [--start=90] [--every=1]"""

import json

import keras
from absl import app, flags

import tfloop
from experiments.averaging.data import noisy
from experiments.averaging.judge import Judge
from experiments.averaging.model import build
from experiments.averaging.picture import accuracy_by_epoch

FLAGS = flags.FLAGS
flags.DEFINE_enum("kind", "swa", ["swa", "ema"], "Kind of average.")
flags.DEFINE_integer("start", 90, "The update after which the first snapshot is taken.", lower_bound=0)
flags.DEFINE_integer("every", 1, "Updates between snapshots.", lower_bound=1)
flags.DEFINE_float("decay", 0.99, "Of the EMA.", lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_float("noise", 0.3, "Standard deviation of the noise in every pixel.", lower_bound=0.0)
tfloop.binary.define_flags(epochs=15, batch_size=32, learning_rate=1.0)


def main(argv):
    train, test = noisy(FLAGS.data, FLAGS.data_dir, FLAGS.noise)
    model = build(train[0].shape[1:])
    model.compile(
        keras.optimizers.SGD(FLAGS.learning_rate, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    average = tfloop.WeightAverage(FLAGS.kind, FLAGS.start, FLAGS.every, FLAGS.decay)
    judge = Judge(average, train, test)
    run = tfloop.binary.train(model, *train, validation_data=test, callbacks=[average, judge])

    last = {name: accuracies[-1] for name, accuracies in judge.curves.items()}
    for name, accuracy in last.items():
        print(f"{name:16} {accuracy:.3f}")
    run.path("accuracy.json").write_text(json.dumps(last, indent=2) + "\n")
    accuracy_by_epoch(run.path("accuracy.png"), judge.epochs, judge.curves)


if __name__ == "__main__":
    app.run(main)
