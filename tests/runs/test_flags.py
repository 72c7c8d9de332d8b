"""Flags: a bad value ends with one line and a status, before anything is trained or written."""

import json
import math
import os
import subprocess
import sys

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from tfloop.runs import flags as module
from tfloop.runs.errors import Refused
from tfloop.runs.flags import Every, Parametrize, Watch

CONTRACT = (
    "workdir epochs batch_size learning_rate seed deterministic jit precision strategy accumulate watch "
    "parametrize checkpoint_every keep resume on_nan progress log dry_run overfit_one_batch profile "
    "verify data data_dir"
).split()

BINARY = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from saver import without_tensorflow
without_tensorflow()
from absl import app, flags
from tfloop.runs import flags as ours
from tfloop.runs.errors import Refused
ours.define(epochs=2)
flags.DEFINE_float("temperature", 1.0, "The binary's own.")

def main(argv):
    try:
        ours.check(argv)
    except Refused as error:
        sys.exit(print(error, file=sys.stderr) or error.exit_status)
    open("trained", "w")

app.run(main)
"""


def parsed(*arguments, **defaults):
    values = flags.FlagValues()
    module.define(values, **defaults)
    rest = values(["binary", *arguments])
    module.check(rest, values)
    return values


def test_the_contracts_flags_are_there_and_no_others():
    assert sorted(parsed()) == sorted(CONTRACT)
    assert sorted(module._NAMES) == sorted(CONTRACT)


def test_values_come_parsed():
    values = parsed(
        "--watch=encoder/*=rms",
        "--watch=*",
        "--parametrize=*/kernel=spectral_norm",
        "--parametrize=head/*=bounded:-1,2.5",
        "--checkpoint_every=60s",
        "--log=csv,tensorboard",
        "--nodeterministic",
    )
    assert values.watch == [Watch("encoder/*", "rms"), Watch("*", "rms")]
    assert values.parametrize == [
        Parametrize("*/kernel", "spectral_norm"),
        Parametrize("head/*", "bounded", (-1.0, 2.5)),
    ]
    assert values.checkpoint_every == Every(seconds=60.0)
    assert values.log == ("csv", "tensorboard")
    assert values.deterministic is False


def test_defaults_are_the_contracts_and_a_binary_may_set_them():
    values = parsed()
    assert (values.jit, values.resume, values.on_nan, values.strategy) == ("auto", "auto", "stop", "none")
    assert (values.checkpoint_every, values.log, values.workdir) == (Every(), ("tensorboard",), None)
    values = parsed("--batch_size=7", epochs=20, data="mnist", log="none")
    assert (values.epochs, values.batch_size, values.data, values.log) == (20, 7, "mnist", ())
    with pytest.raises(ValueError, match="'epoch'"):
        parsed(epoch=3)


@pytest.mark.parametrize(
    "argument",
    [
        *("--epochs=0", "--epochs=x", "--batch_size=-1", "--keep=0", "--accumulate=0", "--seed=-1"),
        *("--learning_rate=nan", "--learning_rate=inf", "--learning_rate=-1", "--learning_rate=1e999"),
        *(f"--seed={2**32}", "--jit=yes", "--precision=float64", "--strategy=tpu", "--resume=maybe"),
        *("--checkpoint_every=0", "--checkpoint_every=-5", "--checkpoint_every=nans", "--log=wandb"),
        *("--checkpoint_every=infs", "--checkpoint_every=0s", "--checkpoint_every=", "--on_nan=pray"),
        *("--watch==rms", "--watch=*=", "--watch=*=a b", "--parametrize=*/kernel", "--parametrize=*=x"),
        *("--parametrize=*=max_norm:nan", "--parametrize=*=max_norm:", "--learning_rte=1", "--deterministic=2"),
    ],
)
def test_a_bad_value_is_refused_while_parsing(argument):
    with pytest.raises(flags.Error) as caught:
        parsed(argument)
    assert argument.lstrip("-").split("=")[0] in str(caught.value)


@pytest.mark.parametrize("argument", ["epochs=3", "stray", "-"])
def test_a_stray_argument_is_refused(argument):
    with pytest.raises(Refused, match="Unexpected argument"):
        parsed(argument)


def test_a_learning_rate_of_zero_is_refused():
    with pytest.raises(Refused, match="learning_rate"):
        parsed("--learning_rate=0")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_of_a_binarys_own_flags_must_be_finite_too(number):
    values = flags.FlagValues()
    module.define(values)
    flags.DEFINE_float("temperature", 1.0, "The binary's own.", flag_values=values)
    flags.DEFINE_multi_float("betas", [1.0], "The binary's own.", flag_values=values)
    for name in ("temperature", "betas"):
        values.unparse_flags()
        values(["binary", f"--{name}={number}"])
        with pytest.raises(Refused, match=name):
            module.check(["binary"], values)
        values[name].unparse()


@pytest.mark.parametrize(
    "arguments, status, says",
    [
        (["--epochs=0"], 1, "epochs"),
        (["--epocs=3"], 1, "Did you mean: epochs"),
        (["--learning_rate=nan"], 1, "must be finite"),
        (["--temperature=nan"], 2, "--temperature=nan"),
        (["stray"], 2, "Unexpected argument 'stray'"),
        (["--undefok=epocs", "--epocs=3"], 2, "--undefok is refused"),
        ([], 0, ""),
    ],
)
def test_a_binary_ends_with_one_line_and_a_status_before_it_trains(tmp_path, arguments, status, says):
    command = [sys.executable, "-c", BINARY, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == status, result.stderr
    assert says in result.stderr and "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == (["trained"] if status == 0 else [])
    if status == 2:
        assert result.stderr.count("\n") == 1


def test_the_configuration_is_json_of_our_and_the_binarys_flags():
    values = flags.FlagValues()
    module.define(values)
    flags.DEFINE_float("temperature", 0.5, "The binary's own.", flag_values=values)
    values(["binary", "--watch=a/*=norm", "--parametrize=*=max_norm:2", "--checkpoint_every=10"])
    config = json.loads(json.dumps(module.values(values)))
    assert config["watch"] == ["a/*=norm"] and config["parametrize"] == ["*=max_norm:2"]
    assert config["checkpoint_every"] == "10" and config["temperature"] == 0.5
    assert config["log"] == ["tensorboard"]
    assert set(config) == {*CONTRACT, "temperature"}


def test_defining_twice_is_defining_once():
    values = flags.FlagValues()
    module.define(values)
    module.define(values, epochs=9)
    values(["binary"])
    assert values.epochs == 9


@given(st.integers(1, 10**12))
def test_any_number_of_steps_is_understood(steps):
    assert module.parse_every(str(steps)) == Every(steps=steps)
    assert module.parse_every(str(Every(steps=steps))) == Every(steps=steps)


@given(st.text())
def test_any_text_is_a_checkpoint_interval_or_a_value_error(text):
    try:
        every = module.parse_every(text)
    except ValueError:
        return
    assert every == Every() or (every.steps or every.seconds) > 0
    assert math.isfinite(every.steps or every.seconds or 0)


@given(st.text(), st.sampled_from(["rms", "norm", "histogram"]))
def test_a_pattern_may_hold_anything_but_nothing(pattern, statistic):
    if pattern.strip():
        assert module.parse_watch(f"{pattern}={statistic}") == Watch(pattern.strip(), statistic)
