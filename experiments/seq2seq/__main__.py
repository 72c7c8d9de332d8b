"""python -m experiments.seq2seq [--examples=20000] [--units=64]"""

import json

import keras
import numpy as np
from absl import app, flags

import tfloop
from experiments.seq2seq import data
from experiments.seq2seq.model import attention, build, decode
from experiments.seq2seq.picture import attention_maps

FLAGS = flags.FLAGS
flags.DEFINE_integer("examples", 20_000, "Numbers to train on.", lower_bound=1)
flags.DEFINE_integer("units", 64, "Width of every layer, a multiple of 4.", lower_bound=4)
tfloop.binary.define_flags(epochs=6, batch_size=128)


def main(argv):
    train, test = data.numbers(FLAGS.examples)
    x, x_test = data.encode(train), data.encode(test)
    model = build(FLAGS.units)
    model.compile(keras.optimizers.Adam(FLAGS.learning_rate))
    run = tfloop.binary.train(model, x, None, validation_data=(x_test, None))

    signs = decode(model, x_test["words"])
    right = np.array([data.digits(chosen) == str(number) for chosen, number in zip(signs, test, strict=True)])
    print(f"{right.mean():.1%} of {len(test)} held-out numbers are read exactly.")
    run.path("decoded.json").write_text(json.dumps({"exact": float(right.mean())}) + "\n")
    shown = np.argsort([-len(data.words(number)) for number in test])[:200:50]
    maps = attention(model, x_test["words"][shown], signs[shown])
    attention_maps(run.path("attention.png"), test[shown], signs[shown], maps)


if __name__ == "__main__":
    app.run(main)
