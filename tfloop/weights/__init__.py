"""Weights normalised before use: what a weight is when a layer reads it.

`parametrization.py` says what a parametrisation is, `effective.py` and `forward.py` are the mechanism, one
file each holds the catalogue, `wrapper.py` and `parametrize.py` are the ways in, `bake.py` the way out.
"""

from tfloop.weights.bake import bake as bake
from tfloop.weights.bounded import Bounded as Bounded
from tfloop.weights.catalogue import get as get
from tfloop.weights.centered import Centered as Centered
from tfloop.weights.function import Function as Function
from tfloop.weights.max_norm import MaxNorm as MaxNorm
from tfloop.weights.non_negative import NonNegative as NonNegative
from tfloop.weights.orthogonal import Orthogonal as Orthogonal
from tfloop.weights.parametrization import Parametrization as Parametrization
from tfloop.weights.parametrize import apply_waiting as apply_waiting
from tfloop.weights.parametrize import are_waited_for as are_waited_for
from tfloop.weights.parametrize import effective_weights as effective_weights
from tfloop.weights.parametrize import parametrization_config as parametrization_config
from tfloop.weights.parametrize import parametrize as parametrize
from tfloop.weights.parametrize import restore_parametrizations as restore_parametrizations
from tfloop.weights.parametrize import warm_start as warm_start
from tfloop.weights.spectral_norm import SpectralNorm as SpectralNorm
from tfloop.weights.unit_norm import UnitNorm as UnitNorm
from tfloop.weights.weight_norm import WeightNorm as WeightNorm
from tfloop.weights.wrapper import Parametrized as Parametrized
from tfloop.weights.wrapper import SpectralNormalization as SpectralNormalization
