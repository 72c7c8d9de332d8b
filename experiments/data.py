"""Sets of images with labels: scikit-learn's digits, which come with it, and those that Keras downloads."""

import pathlib
import sys

import keras
import numpy as np

KERAS = {"mnist": keras.datasets.mnist, "fashion_mnist": keras.datasets.fashion_mnist}


def images(name="digits", data_dir=None):
    """`(x, y), (x_test, y_test)`: float32 images (n, height, width, 1) in 0 .. 1, and int32 labels.

    `"digits"`: 1437 images of 8 x 8 to train on and 360 to test. `"mnist"`, `"fashion_mnist"`: 60000 and 10000
    of 28 x 28, read from `data_dir/<name>.npz` (`x_train`, `y_train`, `x_test`, `y_test`) if there is such a
    file, else downloaded. Another name, or a failing download, ends the process with one line and status 1.
    """
    if name == "digits":
        return digits()
    if name not in KERAS:
        sys.exit(f"--data={name}: there is no such data set. There is digits, {', '.join(KERAS)}.")
    path = pathlib.Path(data_dir or "") / f"{name}.npz"
    if data_dir and path.exists():
        with np.load(path, allow_pickle=False) as file:
            train, test = ((file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test"))
    else:
        try:
            train, test = KERAS[name].load_data()
        except Exception as error:  # Keras has no narrower one
            sys.exit(f"--data={name} cannot be downloaded ({error}). Put {name}.npz into a folder and give --data_dir.")
    return scaled(*train, 255), scaled(*test, 255)


def digits():
    """Every fifth image is for testing: neighbours in the file are not by one hand."""
    from sklearn.datasets import load_digits

    data = load_digits()
    test = np.arange(len(data.target)) % 5 == 0
    return scaled(data.images[~test], data.target[~test], 16), scaled(data.images[test], data.target[test], 16)


def scaled(x, y, largest):
    return (x[..., None] / largest).astype("float32"), np.asarray(y).astype("int32")
