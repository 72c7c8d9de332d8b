"""A stall is said, with the place where it happens, and nothing is said while steps end."""

import time

from tfloop.runs.watchdog import Watchdog


def where_it_stalls(seconds):
    time.sleep(seconds)


def test_a_stall_is_said_with_the_stacks(caplog, capfd):
    with Watchdog(stall=1.0):
        where_it_stalls(1.8)
    assert caplog.text.count("No training step has ended for") == 1
    assert "where_it_stalls" in capfd.readouterr().err


def test_nothing_is_said_while_steps_end(caplog):
    with Watchdog(stall=3.0) as watchdog:
        for _ in range(80):
            watchdog.alive()
            time.sleep(0.05)
    assert "No training step" not in caplog.text
