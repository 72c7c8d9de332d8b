"""Wrappers: a layer whose weights are parametrised, in the form of a layer."""

import fnmatch
import functools
import inspect
import types

import keras

from tfloop import _keras, names
from tfloop.weights.catalogue import get_list
from tfloop.weights.effective import attach, owned_weights
from tfloop.weights.forward import current_forward_pass, forward_pass
from tfloop.weights.parametrize import effective_weights, enter_above, matching, outside_graph, serialized
from tfloop.weights.spectral_norm import SpectralNorm


class PassedOn:
    """An attribute of the wrapper that is one of the wrapped layer, if that has it."""

    def __set_name__(self, owner, name):
        self._name = name

    def __get__(self, wrapper, owner=None):
        return self if wrapper is None else getattr(wrapper.layer, self._name)

    def __set__(self, wrapper, value):
        setattr(wrapper.layer, self._name, value)


@keras.saving.register_keras_serializable("tfloop")
class Parametrized(keras.layers.Wrapper):
    """A layer that computes with effective weights.

    Args:
        layer: any Keras layer, built or not. A built one keeps its weights, as raw weights.
        parametrizations: dict from names to parametrisations. A name is a variable's (`"kernel"`: every such
            variable below the layer; `fnmatch` patterns too) or, with a slash, a pattern of paths below the
            layer (`"forward_layer/*/kernel"`). A parametrisation is a `Parametrization`, its name, a function
            of a tensor, or a list of these, applied in order.
        **kwargs: of `keras.layers.Layer`; the dtype policy is the layer's unless given.

    It takes the arguments that the layer takes (`training`, `mask`, `initial_state`, ...), gives what the
    layer gives, and can stand where the layer can: in `TimeDistributed`, `Bidirectional` or, around a cell,
    in `keras.layers.RNN`. (A cell with dropout is better parametrised through its RNN layer: Keras draws the
    mask once a sequence only for cells of its own classes.)

    Raises `ValueError` when the layer is built (at once if it is) and a name is none of its weights, or it
    has no weights; `TypeError` for a weight that is not of a floating dtype.

    ```python
    layer = tfloop.Parametrized(
        layers.LSTM(4), {"kernel": tfloop.SpectralNorm(), "recurrent_kernel": tfloop.Orthogonal()}
    )
    assert layer(np.ones((2, 5, 3), "float32"), training=True).shape == (2, 4)
    assert sorted(layer.effective_weights()) == ["cell/kernel", "cell/recurrent_kernel"]
    ```
    """

    state_size = PassedOn()
    output_size = PassedOn()
    return_sequences = PassedOn()
    return_state = PassedOn()
    stateful = PassedOn()
    go_backwards = PassedOn()
    zero_output_for_mask = PassedOn()
    reset_state = PassedOn()

    def __init__(self, layer, parametrizations, **kwargs):
        if isinstance(layer, keras.layers.Layer):
            self.__dict__["call"] = called_through(layer)
            # Keras matches the shapes that it hands to `build` with the names of its arguments.
            self.build.__dict__["__signature__"] = inspect.signature(layer.build)
            kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        if not parametrizations:
            raise ValueError(f"Parametrized({layer.name!r}, {{}}): no parametrisation is given.")
        self.supports_masking = layer.supports_masking
        # Keras would take the patterns in a plain dict for sublayers.
        self._parametrizations = types.MappingProxyType(
            {name: tuple(get_list(given)) for name, given in parametrizations.items()}
        )
        self._attached = False
        if layer.built:
            self._attach()

    @property
    def parametrizations(self):
        """The parametrisations by name, as given."""
        return {name: list(given) for name, given in self._parametrizations.items()}

    def effective_weights(self):
        """`path -> tensor` below the wrapped layer: what its forward pass uses."""
        return effective_weights(self.layer)

    @property
    def get_initial_state(self):
        """The cell's. An RNN layer asks for it before its loop over time: there the forward pass begins, so
        that the loop finds the effective weights made."""
        current_forward_pass()
        return self.layer.get_initial_state

    def build(self, *shapes, **named_shapes):
        with outside_graph():
            if not self.layer.built:
                build_layer(self.layer, *shapes, **named_shapes)
            self._attach()
        self.built = True

    def _attach(self):
        if self._attached:
            return
        weights = owned_weights(self.layer)
        if not weights:
            raise ValueError(f"{self.layer.name!r} ({type(self.layer).__name__}) has no weights to parametrise.")
        targets = list(self._targets(weights))
        for path, given in targets:
            owner, variable = weights[path]
            attach(owner, variable, given, path, holder=self)
        enter_above(self.layer, [weights[path][1] for path, _ in targets])
        self._attached = True

    def _targets(self, weights):
        """Pairs of a path and its parametrisations."""
        for name, given in self._parametrizations.items():
            found = matching(weights, name)
            if not found:
                raise ValueError(
                    f"{name!r} is not a weight of {self.layer.name!r} ({type(self.layer).__name__}). Its weights "
                    f"are {names.listing(weights)}."
                )
            yield from ((path, given) for path in found)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_mask(self, *args, **kwargs):
        return self.layer.compute_mask(*args, **kwargs)

    def get_build_config(self):
        return self.layer.get_build_config()

    def build_from_config(self, config):
        with outside_graph():
            if not self.layer.built:
                self.layer.build_from_config(config)
            self._attach()
        self.built = True

    def get_config(self):
        return {
            **super().get_config(),
            "parametrizations": {name: serialized(given) for name, given in self._parametrizations.items()},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = with_layer(config, custom_objects)
        given = config.pop("parametrizations")
        restored = {
            name: [keras.saving.deserialize_keras_object(c, custom_objects) for c in chain]
            for name, chain in given.items()
        }
        return cls(config.pop("layer"), restored, **config)


@keras.saving.register_keras_serializable("tfloop")
class SpectralNormalization(Parametrized):
    """A layer whose kernels are divided by their largest singular value before they are used.

    `Parametrized` with `SpectralNorm` for every kernel below the layer (`kernel`, `recurrent_kernel`,
    `depthwise_kernel`, `pointwise_kernel`) and every table of an `Embedding`; for gamma if there is none.

    Args:
        layer: any Keras layer with one of these.
        iterations: int, power iterations a training step.
        norm: float, the spectral norm that the weights get.
        **kwargs: of `keras.layers.Layer`.

    ```python
    x = keras.Input((8,))
    y = tfloop.SpectralNormalization(layers.Dense(100, activation="relu"))(x)
    model = keras.Model(x, y)
    effective = model.layers[1].effective_weights()["kernel"]
    np.testing.assert_allclose(np.linalg.norm(effective, 2), 1.0, rtol=1e-2)
    ```
    """

    def __init__(self, layer, iterations=1, norm=1.0, **kwargs):
        super().__init__(layer, {"*": SpectralNorm(iterations=iterations, norm=norm)}, **kwargs)

    def _targets(self, weights):
        (given,) = self._parametrizations.values()
        variables = {path: path.split("/")[-1] for path in weights}
        kernels = [p for p, n in variables.items() if fnmatch.fnmatchcase(n, "*kernel") or n == "embeddings"]
        found = kernels or [p for p, n in variables.items() if n == "gamma"]
        if not found:
            raise ValueError(
                f"SpectralNormalization: {self.layer.name!r} ({type(self.layer).__name__}) has no kernel, table or "
                f"gamma, only {names.listing(weights)}. Name the weight: "
                "Parametrized(layer, {name: SpectralNorm()})."
            )
        return [(path, given) for path in found]

    def get_config(self):
        config = super().get_config()
        (chain,) = self._parametrizations.values()
        del config["parametrizations"]
        return {**config, "iterations": chain[0].iterations, "norm": chain[0].norm}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = with_layer(config, custom_objects)
        return cls(config.pop("layer"), **config)


def called_through(layer):
    """The wrapper's `call`, with the signature of the layer's: Keras looks there for `training` and `mask`."""

    @functools.wraps(layer.call)
    def call(*args, **kwargs):
        with forward_pass(kwargs.get("training")):
            return layer(*args, **kwargs)

    call.__dict__["enters_forward_pass"] = True
    return call


def build_layer(layer, *shapes, **named_shapes):
    """Builds a layer for input shapes, also one whose class leaves that to its first call."""
    if not _keras.has_own_build(layer):
        (shape,) = (*shapes, *named_shapes.values())
        inputs = keras.tree.map_shape_structure(keras.KerasTensor, shape)
        layer.compute_output_spec(inputs)
    layer.build(*shapes, **named_shapes)


def with_layer(config, custom_objects):
    """The config with its layer made. `Bidirectional` turns a copy round by an entry of the outer config."""
    config = dict(config)
    layer = dict(config["layer"])
    if "go_backwards" in config:
        layer["config"] = {**layer["config"], "go_backwards": config.pop("go_backwards")}
    config["layer"] = keras.saving.deserialize_keras_object(layer, custom_objects)
    return config
