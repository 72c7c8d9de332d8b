"""The private names of Keras and TensorFlow that cannot be avoided, each with its reason.

Read in keras 3.15.1 and TensorFlow 2.21. `tests/test_keras_internals.py` notices when one of them changes.
"""

from keras.src.models.functional import Functional  # noqa: F401  the class behind keras.Model(inputs, outputs)

# Attributes in which Keras keeps its own books: they hold layers, but name none of them.
BOOKKEEPING_ATTRIBUTES = frozenset(
    {
        "_layers",
        "_metrics",
        "_tracker",
        "_functional",
        "_operations",
        "_operations_by_depth",
        "_nodes",
        "_nodes_by_depth",
        "_inbound_nodes",
        "_outbound_nodes",
        "_inputs",
        "_outputs",
        "_inputs_struct",
        "_outputs_struct",
        "_compiled_trainable_state",
        "_compile_config",
    }
)


def is_bookkeeping(attribute):
    """Whether an attribute of a layer is Keras' or (`_self_...`) TensorFlow's own record of children."""
    return attribute in BOOKKEEPING_ATTRIBUTES or attribute.startswith("_self_")


def tracked_layers(layer):
    """The sublayers that Keras tracks for a layer. `Model.layers` is public, `Layer`'s list is not."""
    return list(getattr(layer, "_layers", ()))
