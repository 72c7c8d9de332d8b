"""The model for prediction: what is left of a training model whose targets were inputs."""

import keras

from tfloop import names


def without_inputs(model, inputs, outputs=None):
    """The functional model without some of its inputs. It shares the layers, and so the weights.

    For models that take their targets as inputs, so that any loss can be a tensor of the graph.

    Args:
        model: a functional model.
        inputs: the names of the inputs to leave out: names of input layers, or keys where the
            inputs are a dictionary.
        outputs: the names of the outputs to keep; all of them by default. A single name gives
            a model with that one output.

    Returns a `keras.Model` with what is left of the inputs' structure (a list of one is that one).

    Raises `TypeError` for a model that is not functional; `ValueError` for a name that there is not,
    and for an output that cannot be computed without the inputs.

    ```python
    x, y = keras.Input((4,), name="x"), keras.Input((1,), name="y")
    y_pred = layers.Dense(1)(x)
    model = tfloop.Model([x, y], y_pred)
    model.add_loss(ops.mean((y_pred - y) ** 2))
    prediction = tfloop.without_inputs(model, ["y"])
    assert prediction(np.ones((3, 4))).shape == (3, 1)
    ```
    """
    if not isinstance(model, keras.Function):
        raise TypeError(
            f"{model.name!r} is no functional model: it has no graph in which to look for what needs "
            "the inputs. In a subclassed model make them optional in `call`."
        )
    given = named(model.input, zip([x.name for x in model.inputs], model.inputs, strict=True))
    made = named(model.output, zip(model.output_names, model.outputs, strict=True))
    removed = choose([inputs] if isinstance(inputs, str) else inputs, given, "input", model)
    kept = [x for x in model.inputs if not contains(removed, x)]
    if not kept:
        raise ValueError(f"Without {names.listing(inputs)} {model.name!r} has no input left.")
    wanted = model.output
    if outputs is not None:
        chosen = choose([outputs] if isinstance(outputs, str) else outputs, made, "output", model)
        wanted = chosen[0] if isinstance(outputs, str) else only(model.output, chosen)
    refuse_outputs_that_need(removed, kept, keras.tree.flatten(wanted), given, made)
    return keras.Model(only(model.input, kept), wanted, name=f"{model.name}_prediction")


def named(structure, by_layer):
    """`(name, tensor)` for every name that a tensor goes by: its key in a dictionary, its layer's name."""
    keys = list(structure.items()) if isinstance(structure, dict) else []
    return [(k, t) for k, t in keys if isinstance(t, keras.KerasTensor)] + list(by_layer)


def choose(wanted, pairs, kind, model):
    found = []
    for name in wanted:
        tensors = [tensor for known, tensor in pairs if known == name]
        if not tensors:
            known = dict.fromkeys(known for known, _ in pairs)
            raise ValueError(f"{model.name!r} has no {kind} {name!r}. {names.nearest(name, known)}")
        found.append(tensors[0])
    return found


def contains(tensors, tensor):
    return any(t is tensor for t in tensors)


def only(structure, tensors):
    """The structure without the tensors that are not among `tensors`."""
    if isinstance(structure, dict):
        left = {k: only(v, tensors) for k, v in structure.items()}
        return {k: v for k, v in left.items() if v is not None} or None
    if isinstance(structure, list | tuple):
        parts = [part for part in (only(v, tensors) for v in structure) if part is not None]
        return (parts[0] if len(parts) == 1 else parts) if parts else None
    return structure if contains(tensors, structure) else None


def refuse_outputs_that_need(removed, kept, wanted, given, made):
    needing = {name_of(t, made): t for t in wanted if not is_computable(kept, t)}
    if not needing:
        return
    name, output = next(iter(needing.items()))
    needed = [
        name_of(x, given) for x in removed if not is_computable([*kept, *(r for r in removed if r is not x)], output)
    ]
    free = [name_of(t, made) for t in wanted if name_of(t, made) not in needing]
    remedy = f"outputs={free} keeps those that do not." if free else "None does without."
    raise ValueError(
        f"The output {name!r} needs {names.listing(needed)}, which without_inputs was to leave out. {remedy}"
    )


def name_of(tensor, pairs):
    return next(name for name, known in pairs if known is tensor)


def is_computable(inputs, output):
    """Whether the inputs are enough for an output: Keras refuses a function that they are not."""
    try:
        keras.Function(inputs, output)
    except ValueError:
        return False
    return True
