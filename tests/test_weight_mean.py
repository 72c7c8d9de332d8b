"""The mean over models, checkpoints and files against NumPy; what is refused, and that nothing is changed then."""

import keras
import numpy as np
import pytest
from keras import layers

from tfloop import reproducibility
from tfloop.model import Model
from tfloop.runs import checkpoint_file
from tfloop.weight_mean import average
from tfloop.weights.spectral_norm import SpectralNorm
from tfloop.weights.wrapper import SpectralNormalization


def network(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, activation="tanh"), layers.BatchNormalization(), layers.Dense(2)]
    )


def checkpoint(model, folder):
    """A checkpoint as a run writes it, of a whole state and something else."""
    tensors = {n: v.numpy() for n, v in reproducibility.state_variables(model).items()}
    folder.mkdir()
    checkpoint_file.write(folder, 7, {**tensors, "loop/step": np.array(7)}, "{}", {}, at=lambda point: None)
    return folder


def sources(folder, count=4):
    """Models with their weights, and every way in which they can be saved."""
    models = [network(seed) for seed in range(count)]
    for seed, model in enumerate(models):
        model.compile("adam", "mse")
        model.fit(np.ones((4, 3)) * seed, np.ones((4, 2)), verbose=0)
    models[0].save(folder / "a.keras")
    models[1].save_weights(folder / "b.weights.h5")
    saved = checkpoint(models[3], folder / "step-0000000007")
    return models, [folder / "a.keras", str(folder / "b.weights.h5"), models[2], saved]


def test_average_over_models_and_files_is_numpys_mean(tmp_path):
    models, mixed = sources(tmp_path)
    target = network(seed=9)
    average(target, mixed)
    for i, weight in enumerate(target.weights):
        want = np.mean([np.array(m.weights[i], "float64") for m in models], 0)
        np.testing.assert_allclose(weight, want, rtol=1e-6, atol=1e-8)


def test_average_over_files_leaves_the_optimizer_alone(tmp_path):
    models, mixed = sources(tmp_path)
    target = models[2]
    before = [v.numpy().copy() for v in target.optimizer.variables]
    average(target, mixed)
    for variable, value in zip(target.optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_average_with_itself_changes_nothing(tmp_path):
    model = network()
    before = [w.numpy().copy() for w in model.weights]
    average(model, [model, model])
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_spectral_norm_of_the_mean_is_one():
    models = []
    for seed in range(2):
        keras.utils.set_random_seed(seed)
        layer = SpectralNormalization(layers.Dense(4))
        models.append(keras.Sequential([keras.Input((3,)), layer]))
    average(models[0], models)
    kernel = models[0].layers[0].effective_weights()["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel, 2), 1.0, rtol=2e-3)


@pytest.mark.parametrize("units", [(3,), (3, 4, 2)])
def test_average_refuses_other_architectures_and_changes_nothing(tmp_path, units):
    other = keras.Sequential([keras.Input((3,)), *(layers.Dense(n) for n in units)])
    other.save_weights(tmp_path / "other.weights.h5")
    other.save(tmp_path / "other.keras")
    saved = checkpoint(other, tmp_path / "step-0000000007")
    model = network()
    before = [w.numpy().copy() for w in model.weights]
    for source in (other, tmp_path / "other.weights.h5", tmp_path / "other.keras", saved):
        with pytest.raises(ValueError, match="weights"):
            average(model, [model, source])
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_larger_file_is_refused_not_read_in_part(tmp_path):
    larger = keras.Sequential([*network().layers, layers.Dense(2)])
    larger.build((None, 3))
    larger.save_weights(tmp_path / "larger.weights.h5")
    with pytest.raises(ValueError, match=r"layers/dense_2/vars/0: \(2, 2\) in the file, missing"):
        average(network(), [tmp_path / "larger.weights.h5"])


def test_checkpoint_of_a_parametrised_model_is_refused_by_a_plain_one(tmp_path):
    def model(wrap):
        made = Model(x := keras.Input((3,)), layers.Dense(2, name="out")(layers.Dense(4, name="hidden")(x)))
        if wrap:
            made.parametrize("hidden/kernel", SpectralNorm())
        return made

    saved = checkpoint(model(True), tmp_path / "step-0000000007")
    average(model(True), [saved])
    with pytest.raises(ValueError, match=r"hidden/kernel_spectral_norm/u: \(1, 4\) in the file, missing"):
        average(model(False), [saved])


def test_shapes_are_named_when_they_differ():
    other = network()
    wider = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(5, name="wide"),
            layers.BatchNormalization(),
            layers.Dense(2),
        ]
    )
    with pytest.raises(ValueError, match=r"wide/kernel'.*\(3, 5\).*\(3, 4\)"):
        average(other, [wider])


def test_damaged_and_missing_files_are_refused(tmp_path):
    (tmp_path / "bad.weights.h5").write_bytes(b"nothing")
    (tmp_path / "bad.keras").write_bytes(b"nothing")
    for name in ("bad.weights.h5", "bad.keras"):
        with pytest.raises(ValueError, match=f"{name} is not a Keras weights file"):
            average(network(), [tmp_path / name])
    saved = checkpoint(network(), tmp_path / "step-0000000007")
    (saved / "tensors.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no whole checkpoint: tensors\.safetensors has 7 bytes"):
        average(network(), [saved])
    with pytest.raises(FileNotFoundError):
        average(network(), [tmp_path / "none.weights.h5"])
    with pytest.raises(ValueError, match=r"\.weights\.h5"):
        average(network(), [tmp_path])


def test_sources_are_a_list_and_not_empty(tmp_path):
    with pytest.raises(TypeError, match="list"):
        average(network(), "a.weights.h5")
    with pytest.raises(ValueError, match="empty"):
        average(network(), [])


def test_no_code_of_a_keras_file_is_run(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: x), layers.Dense(2)])
    model.save(tmp_path / "code.keras")
    same = keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: x), layers.Dense(2)])
    average(same, [tmp_path / "code.keras"])  # load_model would refuse, or run the function
    np.testing.assert_array_equal(same.weights[0], model.weights[0])


def test_a_model_whose_parts_alone_are_built_is_averaged():
    class Parts(keras.Model):
        def __init__(self, value):
            super().__init__()
            self.part = layers.Dense(2, kernel_initializer=keras.initializers.Constant(value))
            self.part.build((None, 3))

    target = Parts(0.0)
    average(target, [Parts(3.0), Parts(1.0)])
    np.testing.assert_array_equal(target.part.kernel, np.full((3, 2), 2.0))
