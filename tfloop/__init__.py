"""tfloop: a training loop for TensorFlow and Keras.

Any tensor can be a loss or a metric, weights are normalised before use as part of the model, the loop lives
inside the program, and runs are exact.
"""

from tfloop.layer import Layer
from tfloop.model import Model
from tfloop.progress import Progress, progress
from tfloop.reproducibility import fingerprint, set_seed
from tfloop.statistics import register_statistic
from tfloop.tensors import Tensors, capture, tag

__all__ = [
    "Layer",
    "Model",
    "Progress",
    "Tensors",
    "capture",
    "fingerprint",
    "progress",
    "register_statistic",
    "set_seed",
    "tag",
]
