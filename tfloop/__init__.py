"""tfloop: a training loop for TensorFlow and Keras.

Any tensor can be a loss or a metric, weights are normalised before use as part of the model, the loop lives
inside the program, and runs are exact.
"""

from tfloop.averaging import WeightAverage, averaged
from tfloop.batch_norm import reestimate_batch_norm
from tfloop.layer import Layer
from tfloop.model import Model
from tfloop.numpy_loss import numpy_loss
from tfloop.prediction import without_inputs
from tfloop.progress import Progress, progress
from tfloop.reproducibility import fingerprint, set_seed
from tfloop.runs import binary
from tfloop.runs.run import Run
from tfloop.statistics import register_statistic
from tfloop.tensors import Tensors, capture, tag
from tfloop.weight_mean import average
from tfloop.weights import (
    Bounded,
    Centered,
    Function,
    MaxNorm,
    NonNegative,
    Orthogonal,
    Parametrization,
    Parametrized,
    SpectralNorm,
    SpectralNormalization,
    UnitNorm,
    WeightNorm,
    bake,
    warm_start,
)

__all__ = [
    "Bounded",
    "Centered",
    "Function",
    "Layer",
    "MaxNorm",
    "Model",
    "NonNegative",
    "Orthogonal",
    "Parametrization",
    "Parametrized",
    "Progress",
    "Run",
    "SpectralNorm",
    "SpectralNormalization",
    "Tensors",
    "UnitNorm",
    "WeightAverage",
    "WeightNorm",
    "average",
    "averaged",
    "bake",
    "binary",
    "capture",
    "fingerprint",
    "numpy_loss",
    "progress",
    "reestimate_batch_norm",
    "register_statistic",
    "set_seed",
    "tag",
    "warm_start",
    "without_inputs",
]
