"""The mean of weights over models, checkpoints of a run and Keras' files.

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

from tfloop import reproducibility
from tfloop.runs import checkpoint_file
from tfloop.weights.parametrize import warm_start


def average(model, sources):
    """Sets the model's weights to the mean over the sources.

    `sources`: models of the same architecture, checkpoint folders of a run, `.keras` and
    `.weights.h5` files, in any mixture. Of files only the weights are read: no code, no optimizer.
    The mean is taken in float64, over every weight of a floating dtype, BatchNorm statistics
    included (`tfloop.reestimate_batch_norm` gives those of the averaged weights); others, such as
    counters, stay as they are in the model. Parametrisations are warm-started afterwards.

    Raises `ValueError` if a source has other weights than the model, and leaves the model as it
    was.

    ```python
    a, b = (keras.Sequential([keras.Input((3,)), layers.Dense(2)]) for _ in range(2))
    a.save_weights("a.weights.h5")
    tfloop.average(b, ["a.weights.h5", b])
    ```
    """
    if isinstance(sources, str | pathlib.PurePath | keras.Model):
        raise TypeError(f"sources={sources!r}: expected a list of models and paths.")
    sources = list(sources)
    if not sources:
        raise ValueError("There is nothing to average: sources is empty.")
    if not model.weights:
        raise ValueError(f"{model.name!r} has no weights yet: build it before setting them.")
    floats = [keras.backend.is_float_dtype(w.dtype) for w in model.weights]
    sums = [np.zeros(w.shape, "float64") for w in model.weights]
    for source in sources:
        for total, value in zip(sums, read(source, model), strict=True):
            total += value
    for weight, total, is_float in zip(model.weights, sums, floats, strict=True):
        if is_float:
            weight.assign(total / len(sources))
    warm_start(model)  # the mean of two u is the u of neither


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
    if (path / checkpoint_file.MANIFEST).exists():
        return of_checkpoint(path, model)
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


def of_checkpoint(path, model):
    """By name. What else a checkpoint holds (optimizers, seeds) is not read."""
    names = {id(variable): name for name, variable in reproducibility.weights(model).items()}
    wanted = {names[id(w)]: tuple(w.shape) for w in model.weights}
    try:
        content = checkpoint_file.verify(path)
        strange = content.tensors.keys() - reproducibility.state_variables(model).keys()
        shapes = {n: t.shape for n, t in content.tensors.items() if n in wanted or n in strange}
        last = max((i for i, n in enumerate(shapes) if n in wanted), default=-1)  # weights come first
        refuse_difference(path, dict(list(shapes.items())[: last + 1]), wanted)
        arrays = checkpoint_file.read_tensors(path, content, list(wanted))
    except checkpoint_file.Damaged as error:
        raise ValueError(f"{path} is no whole checkpoint: {error}.") from error
    return [arrays[name] for name in wanted]


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
            shapes: dict[str, object] = {}

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
