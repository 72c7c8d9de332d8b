"""What can be given as a parametrisation: an instance, a name, a function, or a list of them."""

from tfloop import names
from tfloop.weights.bounded import Bounded
from tfloop.weights.centered import Centered
from tfloop.weights.function import Function
from tfloop.weights.max_norm import MaxNorm
from tfloop.weights.non_negative import NonNegative
from tfloop.weights.orthogonal import Orthogonal
from tfloop.weights.parametrization import Parametrization, snake_case
from tfloop.weights.spectral_norm import SpectralNorm
from tfloop.weights.unit_norm import UnitNorm
from tfloop.weights.weight_norm import WeightNorm

CATALOGUE: dict[str, type[Parametrization]] = {
    snake_case(c.__name__): c
    for c in (SpectralNorm, WeightNorm, UnitNorm, MaxNorm, Centered, Orthogonal, Bounded, NonNegative)
}


def get(identifier):
    """The `Parametrization` meant by an instance, a name such as `"spectral_norm"`, or a function of a tensor.

    A name gives the default arguments. Raises `ValueError` for a name that is not known or one whose
    arguments have no default, `TypeError` for anything else.
    """
    if isinstance(identifier, Parametrization):
        return identifier
    if isinstance(identifier, str):
        return by_name(identifier)
    if isinstance(identifier, type) and issubclass(identifier, Parametrization):
        raise TypeError(f"A parametrisation is needed, not its class: write {identifier.__name__}().")
    if callable(identifier):
        return Function(identifier)
    raise TypeError(f"A parametrisation, its name, a function or a list of these is needed, not {identifier!r}.")


def by_name(name):
    if name not in CATALOGUE:
        raise ValueError(f"There is no parametrisation {name!r}. There is {names.listing(CATALOGUE)}.")
    try:
        return CATALOGUE[name]()
    except TypeError as error:
        raise ValueError(
            f"The parametrisation {name!r} needs arguments ({error}): give it in code, as "
            f"{CATALOGUE[name].__name__}(...)."
        ) from error


def get_list(identifiers):
    """The parametrisations meant by one of these or by a list of them, which is applied in order."""
    found = [get(i) for i in (identifiers if isinstance(identifiers, list | tuple) else [identifiers])]
    if not found:
        raise ValueError("An empty list is no parametrisation.")
    return found
