"""What is measured of a trained network: the kernels it uses, its slope, and where its gradient points."""

import json

import keras
import numpy as np
import tensorflow as tf

import tfloop
from experiments.lipschitz.model import LAYERS, cosine, kernel


def slope(model, images):
    """max |dy/dx| over images: the largest spectral norm of the network's Jacobian, a float."""

    @tf.function
    def jacobians(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=False)
        return tape.batch_jacobian(y, x)

    found = jacobians(tf.constant(images)).numpy()
    return float(np.linalg.svd(found.reshape(*found.shape[:2], -1), compute_uv=False).max())


def gradient_cosines(model, x, y):
    """`layer -> (cosine to the raw gradient, cosine to the kernel)` of what the optimizer is given, on a batch.

    The raw gradient is that with respect to the kernel that the forward pass uses. The model stays as it is,
    though one version writes its kernels in a forward pass.
    """
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = [kernel(model, name) for name in LAYERS]
    before = model.get_weights()
    with tfloop.capture(model) as t, tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True))
        used = [t[f"used/{name}"] for name in LAYERS]
    given, raw = tape.gradient(loss, ([held(v) for v in variables], used))
    cosines = {
        name: (float(cosine(g, r)), float(cosine(g, v.value)))
        for name, g, r, v in zip(LAYERS, given, raw, variables, strict=True)
    }
    model.set_weights(before)
    return cosines


def held(variable):
    """The `tf.Variable` of a Keras variable; that of the first device, if a strategy has it on several."""
    value = variable.value
    return value.values[0] if isinstance(value, tf.distribute.DistributedValues) else value


def stable_ranks(model, x):
    """`layer -> |W|_F² / sigma²` of the kernels used in inference: how many directions a kernel really has."""
    with tfloop.capture(model) as t:
        model(x[:1], training=False)
    sigmas = {name: np.linalg.svd(np.asarray(t[f"used/{name}"], "float32"), compute_uv=False) for name in LAYERS}
    return {name: float((s**2).sum() / s[0] ** 2) for name, s in sigmas.items()}


def read_log(path):
    """`(steps, epochs)` of a `metrics.jsonl`, each a dict from names to arrays."""
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    found = {}
    for split in ("train", "epoch"):
        chosen = [row for row in rows if row["split"] == split]
        found[split] = {n: np.array([row[n] for row in chosen]) for n in chosen[-1] if n not in ("split", "nonfinite")}
    return found["train"], found["epoch"]


def summary(model, log, x, y, x_test):
    """The numbers of one version, by name."""
    steps, epochs = log
    sigmas = np.stack([steps[f"sigma_{name}"] for name in LAYERS])
    inference = np.stack([epochs[f"val_sigma_{name}"] for name in LAYERS])
    radial = np.stack([steps[f"radial_{name}"] for name in LAYERS])
    to_raw = [to_raw for to_raw, _ in gradient_cosines(model, x, y).values()]
    return {
        "sigma_in_first_step": float(sigmas[:, 0].max()),
        "worst_sigma_in_training": float(farthest_from_one(sigmas)),
        "worst_sigma_in_inference": float(farthest_from_one(inference)),
        "worst_gradient_along_kernel": float(np.abs(radial).max()),
        "least_cosine_to_raw_gradient": min(to_raw),
        "least_stable_rank": min(stable_ranks(model, x).values()),
        "slope": slope(model, x_test[:1000]),
        "val_accuracy": float(epochs["val_accuracy"][-1]),
    }


def farthest_from_one(values):
    return values.flat[np.abs(values - 1).argmax()]
