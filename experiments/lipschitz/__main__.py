"""python -m experiments.lipschitz [--units=128] [--iterations=20]"""

import json

import keras
from absl import app, flags

import tfloop
from experiments.data import images
from experiments.lipschitz.measure import read_log, summary
from experiments.lipschitz.model import VERSIONS, build
from experiments.lipschitz.picture import curves

FLAGS = flags.FLAGS
flags.DEFINE_integer("units", 128, "Units of the two hidden layers.", lower_bound=1)
flags.DEFINE_integer("iterations", 20, "Power iterations a step, of both wrappers.", lower_bound=1)
tfloop.binary.define_flags(epochs=20, batch_size=64)


def main(argv):
    train, test = images(FLAGS.data, FLAGS.data_dir)
    logs, found = {}, {}
    for version in VERSIONS:
        tfloop.set_seed(FLAGS.seed, deterministic=FLAGS.deterministic)  # all begin with the same raw weights
        model = build(version, train[0].shape[1:], FLAGS.units, iterations=FLAGS.iterations)
        model.compile(
            keras.optimizers.Adam(FLAGS.learning_rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        run = tfloop.binary.train(model, *train, validation_data=test, name=version)
        logs[version] = read_log(run.path("metrics.jsonl"))
        found[version] = summary(model, logs[version], train[0][:256], train[1][:256], test[0])

    folder = tfloop.binary.folder()
    curves(folder / "lipschitz.png", logs)
    (folder / "summary.json").write_text(json.dumps({"metrics": found}, indent=2) + "\n")
    print(table(found))


def table(found):
    """The numbers as text: a row a number, a column a version."""
    names = list(found["plain"])
    rows = [f"{'':<30}" + "".join(f"{version:>12}" for version in found)]
    rows += [f"{name.replace('_', ' '):<30}" + "".join(f"{found[v][name]:12.4f}" for v in found) for name in names]
    return "\n".join(rows)


if __name__ == "__main__":
    app.run(main)
