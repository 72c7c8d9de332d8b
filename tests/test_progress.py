"""The progress display: its numbers, its line at every width, and where it appears."""

import io
import os
import pty
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfloop.progress import Progress, progress
from tfloop.progress_line import (
    Mark,
    State,
    format_duration,
    format_number,
    format_rate,
    format_seconds,
    render_last,
    render_line,
)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make(*args, **options):
    clock, file = Clock(), io.StringIO()
    return Progress(*args, clock=clock, file=file, **options), clock, file


def run(bar, clock, steps, seconds=0.125, **options):
    for step in steps:
        clock.now += seconds
        bar.update(step, **options)


# Values ------------------------------------------------------------------------------------------


def test_values_are_averaged_weighted_by_steps():
    bar, _, file = make(10)
    bar.update(1, [("loss", 1.0)])
    bar.update(4, {"loss": 5.0})
    assert bar.values == {"loss": (1.0 + 3 * 5.0) / 4}
    bar.update(10, {"loss": 0.0})
    assert bar.values == {"loss": 1.6}
    assert "10/10  loss: 1.6000" in file.getvalue()  # the last line shows the mean, not 0


def test_averages_are_those_of_keras_before_the_last_update():
    import keras

    mine, _, _ = make(100, stateful=["rate"])
    theirs = keras.utils.Progbar(100, stateful_metrics=["rate"], verbose=0)
    for step in (1, 2, 2, 7, 30):
        values = [("loss", 1.0 / step), ("rate", float(step))]
        mine.update(step, values)
        theirs.update(step, values)
    for name, (total, count) in theirs._values.items():
        assert mine.values[name] == pytest.approx(total / count)


@pytest.mark.parametrize("stateful", [True, ["a", "b"], {"a", "b"}])
def test_stateful_values_are_shown_as_given(stateful):
    bar, _, _ = make(10, stateful)
    bar.update(1, {"a": 1.0, "b": 2.0})
    bar.update(2, {"a": 3.0, "b": 4.0})
    assert bar.values == {"a": 3.0, "b": 4.0}


def test_one_stateful_name_may_be_given_alone():
    bar, _, _ = make(10, stateful="loss")
    bar.update(1, {"loss": 1.0, "l": 1.0})
    bar.update(2, {"loss": 2.0, "l": 2.0})
    assert bar.values == {"loss": 2.0, "l": 1.5}


def test_final_values_replace_averages_and_keep_the_order():
    bar, _, file = make(4, epoch=2, epochs=5)
    bar.update(4, {"loss": 1.0, "accuracy": 0.5}, finalize=False)
    bar.finish({"loss": 0.25, "val_loss": -0.125})
    assert file.getvalue() == ("Epoch 3/5  4/4  loss: 0.2500 - accuracy: 0.5000 - val_loss: -0.1250  0.0s\n")


def test_arrays_and_numpy_scalars_count_as_their_mean():
    bar, _, _ = make(10)
    bar.update(1, {"a": np.float32(2), "b": np.array([1, 3]), "c": True, "d": 7})
    assert bar.values == {"a": 2.0, "b": 2.0, "c": 1.0, "d": 7.0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "bool"])
def test_tensors_of_every_dtype_are_numbers(dtype):
    import tensorflow as tf

    bar, _, _ = make(10)
    bar.update(1, {"scalar": tf.ones((), dtype), "vector": tf.ones((2,), dtype)})
    assert bar.values == {"scalar": 1.0, "vector": 1.0}


@pytest.mark.parametrize("value", ["high", None, {}, 1j, [1, None]])
def test_what_is_no_number_is_refused_by_name(value):
    bar, _, _ = make(10)
    with pytest.raises(TypeError, match="'accuracy'"):
        bar.update(1, {"accuracy": value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": -1}, "total=-1"),
        ({"total": 3, "start": 4}, "start=4, total=3"),
        ({"start": -1}, "start=-1"),
        ({"verbose": 3}, "Got 3"),
        ({"verbose": "loud"}, "'bar', 'line', 'none'. Got 'loud'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Progress(**arguments)


# Speed -------------------------------------------------------------------------------------------


def test_speed_leaves_out_the_first_update():
    bar, clock, _ = make(100)
    run(bar, clock, [1], seconds=30.0)
    run(bar, clock, range(2, 12), seconds=0.5)
    assert bar.state.rate("step") == pytest.approx(2.0)
    assert bar.state.eta(clock.now) == pytest.approx((100 - 11) / 2)


def test_eta_runs_down_between_updates():
    bar, clock, _ = make(10)
    run(bar, clock, [1, 2], seconds=1.0)
    assert bar.state.eta(clock.now) == pytest.approx(8.0)
    assert bar.state.eta(clock.now + 3.0) == pytest.approx(5.0)
    assert bar.state.eta(clock.now + 30.0) == 0.0


def test_steps_of_an_earlier_process_are_progress_but_not_speed():
    bar, clock, _ = make(1000, start=900)
    run(bar, clock, [901, 902], seconds=1.0)
    assert bar.state.rate("step") == pytest.approx(1.0)
    assert bar.state.eta(clock.now) == pytest.approx(98.0)


def test_one_update_is_enough_for_a_speed():
    bar, clock, _ = make(32)
    run(bar, clock, [16], seconds=2.0, examples=512)
    assert bar.state.rate("step") == 8.0
    assert bar.state.rate("examples") == 256.0


def test_examples_are_counted_for_each_update_or_for_each_step():
    given_each, clock, _ = make(10)
    run(given_each, clock, [1, 2], seconds=1.0, examples=32)
    per_step, clock, _ = make(10, examples_per_step=32)
    run(per_step, clock, [1, 2], seconds=1.0)
    assert given_each.state.rate("examples") == per_step.state.rate("examples") == 32.0


def test_no_time_passed_is_no_speed():
    bar, clock, file = make(2)
    run(bar, clock, [1, 2], seconds=0.0)
    assert file.getvalue() == "2/2  0.0s\n"


# Lines -------------------------------------------------------------------------------------------


def test_elsewhere_than_on_a_terminal_there_is_a_line_every_few_seconds_and_one_at_the_end():
    bar, clock, file = make(100, stateful=True, examples_per_step=32)
    run(bar, clock, range(1, 101), values={"loss": 0.5})
    assert file.getvalue().splitlines() == [
        " 40/100  loss: 0.5000  ETA 8s  8.0 steps/s  256 examples/s",
        " 80/100  loss: 0.5000  ETA 2s  8.0 steps/s  256 examples/s",
        "100/100  loss: 0.5000  12s  125ms/step  256 examples/s",
    ]


@pytest.mark.parametrize("verbose", [0, "none"])
def test_silence(verbose, capsys):
    bar = Progress(1, verbose=verbose)
    bar.update(1, {"loss": 1.0})
    assert capsys.readouterr() == ("", "")


def test_verbose_2_is_one_line_an_epoch_and_nothing_of_an_unfinished_one():
    bar, clock, file = make(100, verbose=2)
    run(bar, clock, range(1, 100), seconds=10)
    bar.close()
    assert file.getvalue() == ""
    bar.update(100)
    assert file.getvalue().count("\n") == 1


def test_finishing_twice_writes_one_line():
    bar, _, file = make(1)
    with bar:
        bar.update(1)
        bar.finish()
        bar.close()
    assert file.getvalue().count("\n") == 1


def test_an_error_leaves_a_line_that_says_how_far_the_loop_came():
    bar, clock, file = make(10, epoch=0)
    with pytest.raises(RuntimeError), bar:
        run(bar, clock, [1, 2, 3])
        raise RuntimeError
    assert file.getvalue() == "Epoch 1   3/10  0.4s  125ms/step\n"


def test_transient_writes_no_last_line():
    bar, clock, file = make(10, title="validation", transient=True)
    run(bar, clock, range(1, 11), seconds=0.9)
    assert [line[:16] for line in file.getvalue().splitlines()] == ["validation   6/1"]


def test_unknown_total():
    bar, clock, file = make()
    run(bar, clock, range(1, 60))
    bar.finish()
    assert file.getvalue() == "40/?  5.0s  125ms/step\n59/59  7.4s  125ms/step\n"


def test_add_advances():
    bar, _, _ = make(10, start=4)
    bar.add(2, {"loss": 1.0})
    bar.add(1, {"loss": 4.0})
    assert bar.current == 7
    assert bar.values == {"loss": 2.0}


def test_a_narrow_character_set_is_respected():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Progress(1, file=file).update(1, {"größe": 1.0})
    assert raw.getvalue().decode("ascii").startswith("1/1  gr??e: 1.0000")


# Iterating ---------------------------------------------------------------------------------------


def test_progress_yields_what_it_is_given_and_counts():
    file = io.StringIO()
    assert list(progress("abc", file=file, clock=Clock())) == ["a", "b", "c"]
    assert file.getvalue() == "3/3  0.0s\n"


def test_progress_counts_the_examples_of_a_batch():
    clock, file = Clock(), io.StringIO()
    batches = [({"image": np.ones((8, 2))}, np.ones(8))] * 4
    for _ in progress(batches, file=file, clock=clock):
        clock.now += 1.0
    assert file.getvalue() == "4/4  4.0s  1.0s/step  8.0 examples/s\n"


def test_progress_of_what_remains_of_a_resumed_run():
    file = io.StringIO()
    list(progress([4, 5], start=3, file=file, clock=Clock()))
    assert file.getvalue() == "5/5  0.0s\n"


@pytest.mark.parametrize("iterable", [iter("ab"), (letter for letter in "ab")])
def test_progress_of_unknown_length(iterable):
    file = io.StringIO()
    list(progress(iterable, file=file, clock=Clock()))
    assert file.getvalue() == "2/2  0.0s\n"


def test_leaving_the_loop_ends_the_display():
    file = io.StringIO()
    for number in progress(range(10), file=file, clock=Clock()):
        if number == 3:
            break
    assert file.getvalue() == " 3/10  0.0s\n"


def test_progress_of_a_tf_dataset():
    import tensorflow as tf

    clock, file = Clock(), io.StringIO()
    for _ in progress(tf.data.Dataset.range(10).batch(5), file=file, clock=clock):
        clock.now += 0.5
    assert file.getvalue() == "2/2  1.0s  500ms/step  10 examples/s\n"


# Text --------------------------------------------------------------------------------------------


def state(step, total=None, values=(), title="", seconds=10.0, examples=0, done=False):
    began = Mark(0, 0, 0.0)
    latest = Mark(step, examples, seconds)
    return State(total, title, began, began, latest, dict(values), done)


FULL = state(
    12,
    32,
    {"loss": 0.1234, "accuracy": 0.9, "hidden_norm": 12.5},
    title="Epoch 3/5",
    seconds=0.12,
    examples=1536,
)


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (None, "Epoch 3/5  12/32  loss: 0.1234 - accuracy: 0.9000 - hidden_norm: 12.5000"
               "  ETA 0s  100 steps/s  12.8k examples/s"),
        (140, "Epoch 3/5  12/32 ━━━━━━━─────────────  loss: 0.1234 - accuracy: 0.9000 - hidden_norm:"
              " 12.5000  ETA 0s  100 steps/s  12.8k examples/s"),
        (100, "Epoch 3/5  12/32  loss: 0.1234 - accuracy: 0.9000 - hidden_norm: 12.5000"
              "  ETA 0s  100 steps/s"),
        (80, "Epoch 3/5  12/32  loss: 0.1234 - accuracy: 0.9000 - hidden_norm: 12.5000  ETA 0s"),
        (60, "Epoch 3/5  12/32  loss: 0.1234 - accuracy: 0.9000 …  ETA 0s"),
        (40, "Epoch 3/5  12/32  loss: 0.1234 …  ETA 0s"),
        (30, "12/32  loss: 0.1234 …"),
        (10, "12/32"),
        (3, "12/"),
    ],
)  # fmt: skip
def test_the_line_at_every_width(width, line):
    shown = render_line(FULL, 0.12, width)
    assert re.sub(" ━+─+", "", shown) == re.sub(" ━+─+", "", line)
    assert width != 140 or shown == line


names = st.text("abcdef/_", min_size=1, max_size=40)
states = st.builds(
    state,
    st.integers(0, 10**6),
    st.none() | st.integers(0, 10**6),
    st.dictionaries(names, st.floats(), max_size=8),
    st.sampled_from(["", "validation", "Epoch 100/100"]),
    st.floats(0, 1e6),
    st.integers(0, 10**9),
)


@given(states, st.integers(1, 200))
def test_no_live_line_is_wider_than_the_terminal(state, width):
    line = render_line(state, state.latest.time, width)
    assert len(line) <= width and "\n" not in line


@given(states, st.integers(20, 200))
def test_the_last_line_is_broken_and_not_cut(state, width):
    lines = render_last(state, state.latest.time, width).splitlines()
    assert all(len(line) <= width for line in lines)
    for value in state.values.values():
        assert any(format_number(value) in line for line in lines)


def test_formats():
    numbers = [0, -0.0, 0.1234, -0.1234, 1e-5, -1e-5, 123456.0, 1e7, float("nan"), float("-inf")]
    assert [format_number(number) for number in numbers] == [
        *("0.0000", "0.0000", "0.1234", "-0.1234", "1.0000e-05", "-1.0000e-05", "123456.0000"),
        *("1.0000e+07", "nan", "-inf"),
    ]
    times = [0, 1.23, 9.96, 34, 59.6, 306, 3599.7, 25689, 183840]
    assert [format_seconds(seconds) for seconds in times] == [
        *("0.0s", "1.2s", "10s", "34s", "1:00", "5:06", "1:00:00", "7:08:09", "2d 03:04"),
    ]
    assert [format_duration(s) for s in (2.5, 0.0094, 218e-6)] == ["2.5s", "9.4ms", "218us"]
    assert [format_rate(r) for r in (0.04, 9.4, 106.2, 13600, 2.1e6)] == [
        *("0.04", "9.4", "106", "13.6k", "2.1M"),
    ]


# A terminal --------------------------------------------------------------------------------------


COLOUR = r"\x1b\[(?:\d+;)*[349]\dm"


def in_terminal(code, width, **environment):
    """What a program writes to a terminal of this width."""
    master, slave = pty.openpty()
    environment = {
        **{name: os.environ[name] for name in os.environ if name not in ("NO_COLOR", "COLUMNS")},
        "TERM": "xterm-256color",
        "COLUMNS": str(width),
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    os.close(slave)
    output = b""
    try:
        while part := os.read(master, 65536):
            output += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(master)
    errors = process.communicate()[1].decode()
    return output.decode(), errors, process.returncode


NESTED = """
    import itertools, sys
    from tfloop.progress import Progress
    clock = itertools.count().__next__
    bar = Progress(4, epoch=0, epochs=2, clock=clock)
    bar.update(1, {"loss": 0.5, "a/long/name/of/some/layer/rms": 1.0})
    print("printed meanwhile")
    print("to the error file", file=sys.stderr)
    bar.update(4, {"loss": 0.5}, finalize=False)
    validation = Progress(2, title="validation", transient=True, clock=clock)
    validation.update(1)
    validation.update(2)
    bar.finish({"val_loss": 0.25})
    print("after")
"""


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_gets_a_live_bar_that_never_wraps(width):
    output, errors, status = in_terminal(NESTED, width)
    assert status == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    lines = [line for part in text.split("\r\n") for line in part.split("\r")]
    assert max(map(len, lines)) <= width
    assert any(line.startswith("Epoch 1/2  1/4") for line in lines)
    assert width < 120 or any(line.startswith("Epoch 1/2  1/4 ━━━") for line in lines)
    assert any(line.startswith("validation  1/2") for line in lines)
    assert "printed meanwhile" in lines and "after" in lines
    assert sum("val_loss: 0.2500" in line for line in lines) == 1
    assert re.search(COLOUR, output)
    # A redirected file stays where it was sent. TensorFlow writes to it, too, when it is imported.
    assert errors.endswith("to the error file\n")


def test_no_color_is_respected():
    output, _, _ = in_terminal(NESTED, 80, NO_COLOR="1")
    assert "━" in output
    assert not re.search(COLOUR, output)


def test_a_dumb_terminal_gets_lines():
    output, _, _ = in_terminal(NESTED, 80, TERM="dumb")
    assert "\x1b" not in output and "val_loss: 0.2500" in output


def test_the_cursor_and_standard_output_come_back_after_an_error():
    code = """
        import sys
        from tfloop.progress import Progress
        bar = Progress(4)
        bar.update(1)
        raise SystemExit(3)
    """
    output, _, status = in_terminal(code, 80)
    assert status == 3
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
