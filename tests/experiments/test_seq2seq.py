"""The seq2seq experiment: its words, its loss, its decoding, and what it reaches."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.seq2seq import data
from experiments.seq2seq.model import build, decode


@pytest.mark.parametrize(
    "number, words",
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (105, "one hundred and five"),
        (999, "nine hundred and ninety nine"),
        (12_004, "twelve thousand and four"),
        (300_000, "three hundred thousand"),
        (373_373, "three hundred and seventy three thousand three hundred and seventy three"),
    ],
)
def test_words_of_a_number(number, words):
    assert " ".join(data.words(number)) == words


def test_no_two_numbers_have_the_same_words_and_none_has_too_many():
    spoken = [tuple(data.words(n)) for n in range(0, data.LIMIT, 7)]
    assert len(set(spoken)) == len(spoken)
    assert max(map(len, spoken)) <= data.MOST_WORDS


def test_inputs_are_shifted_and_padded():
    inputs = data.encode([12_004])
    signs = lambda name: [data.DIGITS[i] for i in inputs[name][0]]
    assert signs("wanted") == ["1", "2", "0", "0", "4", "<end>", "<pad>"]
    assert signs("given") == ["<start>", "1", "2", "0", "0", "4", "<pad>"]
    assert data.digits(inputs["wanted"][0]) == "12004"


def test_held_out_numbers_are_not_trained_on():
    train, test = data.numbers(2000, 500)
    assert (len(train), len(test)) == (2000, 500) and not set(train) & set(test)


def test_loss_is_the_mean_over_what_is_not_padding():
    model = build(units=8)
    inputs = data.encode([7, 12_004])
    model.compile()
    logits = model(inputs)["logits"].numpy().astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = inputs["wanted"]
    costs = -np.take_along_axis(log_p, wanted[..., None], -1)[..., 0]
    loss = model.evaluate(inputs, None, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(loss, costs[wanted != data.PAD].mean(), rtol=1e-5)


def test_padding_and_later_signs_change_nothing():
    model = build(units=8)
    inputs = data.encode([12_004])
    other = {**inputs, "given": inputs["given"].copy()}
    other["given"][0, 3:] = data.END
    np.testing.assert_allclose(model(inputs)["logits"][0, :3], model(other)["logits"][0, :3], atol=1e-6)


def test_decoding_gives_each_place_the_likeliest_sign_after_those_before():
    model = build(units=8)
    inputs = data.encode([12_004, 7])
    signs = decode(model, inputs["words"])
    given = np.concatenate([np.full((2, 1), data.START), signs[:, :-1]], axis=1)
    logits = model({**inputs, "given": given})["logits"].numpy()
    np.testing.assert_array_equal(signs, logits.argmax(-1))


def run(folder, *arguments):
    command = [sys.executable, "-m", "experiments.seq2seq", f"--workdir={folder}", "--progress=none", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads((folder / "decoded.json").read_text())["exact"]


def test_a_short_run_writes_its_results(tmp_path):
    run(tmp_path, "--epochs=1", "--examples=256", "--units=8")
    assert (tmp_path / "attention.png").exists()


@pytest.mark.slow
def test_held_out_numbers_are_read_exactly(tmp_path):
    assert run(tmp_path) >= 0.95
