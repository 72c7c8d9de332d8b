"""Where a model's weights can be read from: another model, a checkpoint folder, a Keras file.

Only arrays are read. No code comes from a file, nothing is unpickled, and a source that does not
hold exactly the model's weights is refused before any is used.
"""

import contextlib
import io
import pathlib
import tempfile
import warnings
import zipfile

import h5py
import keras
import numpy as np


def read(source, model):
    """The weights of `source` in the order of `model.weights`, as a list of arrays.

    Raises `ValueError` if the source's weights are not the model's in number, names and shapes,
    `FileNotFoundError` if there is no such path.
    """
    if isinstance(source, keras.Model):
        return of_model(source, model)
    path = pathlib.Path(source)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    if path.name.endswith((".keras", ".weights.h5")):
        return of_file(path, model)
    raise ValueError(f"{path}: expected a model, a checkpoint folder, a .keras or a .weights.h5 file.")


def of_model(source, model):
    """By position: the names of two models built from the same code may differ by a counter."""
    theirs, ours = source.weights, model.weights
    if len(theirs) != len(ours):
        raise ValueError(f"{source.name!r} has {len(theirs)} weights, {model.name!r} has {len(ours)}.")
    for their, our in zip(theirs, ours, strict=True):
        if tuple(their.shape) != tuple(our.shape):
            raise ValueError(
                f"{their.path!r} of {source.name!r} has shape {tuple(their.shape)}, "
                f"{our.path!r} of {model.name!r} has {tuple(our.shape)}."
            )
    return [np.array(w.numpy()) for w in theirs]


def of_file(path, model):
    """By Keras' own layout, which only Keras can read: into the model, and out of it again."""
    with tempfile.TemporaryDirectory() as folder:
        template = pathlib.Path(folder) / "model.weights.h5"
        model.save_weights(template)
        without = {"optimizer", *optimizers(model)}
        refuse_difference(path, layout(path, without), layout(template, without))
    with restored(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an optimizer that is another than the model's
        model.load_weights(path)
        return [np.array(w.numpy()) for w in model.weights]


def optimizers(model):
    """`attribute -> optimizer`: Keras saves them beside the weights."""
    found = {k: v for k, v in vars(model).items() if isinstance(v, keras.optimizers.Optimizer)}
    if getattr(model, "optimizer", None) is not None:
        found["optimizer"] = model.optimizer
    return found


def layout(path, without=()):
    """`dataset -> shape` of a Keras weights file, but not of the top-level groups `without`. Links
    are not followed."""
    try:
        with contextlib.ExitStack() as stack:
            file = path
            if path.suffix == ".keras":
                archive = stack.enter_context(zipfile.ZipFile(path))
                file = io.BytesIO(archive.read("model.weights.h5"))
            weights = stack.enter_context(h5py.File(file, "r"))
            shapes: dict[str, tuple] = {}

            def note(name, item):
                if isinstance(item, h5py.Dataset) and name.split("/")[0] not in without:
                    shapes[name] = "outside the file" if item.external else item.shape

            weights.visititems(note)
            return shapes
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a Keras weights file, or it is damaged: {error}") from error


def refuse_difference(path, theirs, ours):
    differences = [
        f"{name}: {theirs.get(name, 'missing')} in the file, {ours.get(name, 'missing')} in the model"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} holds other weights than the model ({len(differences)} differ): " + "; ".join(differences[:5])
        )


@contextlib.contextmanager
def restored(model):
    """After the block the model's weights and its optimizers' state are what they were before it."""
    variables = list(model.weights)
    for optimizer in optimizers(model).values():
        variables += optimizer.variables
    saved = [np.array(v.numpy()) for v in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, saved, strict=True):
            variable.assign(value)
