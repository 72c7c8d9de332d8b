"""python -m experiments.mmd [--mmd_weight=0.3]"""

import json

import keras
import numpy as np
from absl import app, flags

import tfloop
from experiments.mmd.data import domains
from experiments.mmd.model import build
from experiments.mmd.picture import both_domains

FLAGS = flags.FLAGS
flags.DEFINE_float("mmd_weight", 0.3, "Weight of the loss that moves the domains together.", lower_bound=0.0)
tfloop.binary.define_flags(epochs=60, batch_size=128)


def main(argv):
    source, target, test = domains(FLAGS.data, FLAGS.data_dir)
    panels, accuracy = {}, {}
    for name, weight in (("without", 0.0), ("with", FLAGS.mmd_weight)):
        tfloop.set_seed(FLAGS.seed)  # both begin with the same weights
        model = build(source[0].shape[1:], mmd_weight=weight)
        model.compile(keras.optimizers.Adam(FLAGS.learning_rate))
        inputs = {"source": source[0], "labels": source[1], "target": target[0]}
        tfloop.binary.train(model, inputs, None, name=name)

        prediction = tfloop.without_inputs(model, ["source", "labels"])  # asks for no label
        predict = lambda images, prediction=prediction: prediction.predict({"target": images}, verbose=0)
        accuracy[name] = float(np.mean(predict(test[0])["logits"].argmax(-1) == test[1]))
        title = f"{name} the loss: accuracy {accuracy[name]:.3f} on the target"
        panels[title] = (predict(source[0])["features"], source[1], predict(test[0])["features"], test[1])
        print(title)

    folder = tfloop.binary.folder()
    both_domains(folder / "features.png", panels)
    metrics = {f"target_accuracy_{name}": value for name, value in accuracy.items()}
    (folder / "summary.json").write_text(json.dumps({"metrics": metrics}, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
