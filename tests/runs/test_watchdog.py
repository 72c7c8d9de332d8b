"""A stall is said, with the place where it happens, and nothing is said while steps end."""

import time

from tfloop.runs.watchdog import Watchdog


def where_it_stalls(seconds):
    time.sleep(seconds)


def test_a_stall_is_said_with_the_stacks(caplog, capfd):
    with Watchdog(stall=0.3):
        where_it_stalls(0.5)
    assert caplog.text.count("No training step has ended for") == 1
    assert "where_it_stalls" in capfd.readouterr().err


def test_nothing_is_said_while_steps_end(caplog):
    with Watchdog(stall=0.5) as watchdog:
        for _ in range(20):
            watchdog.alive()
            time.sleep(0.05)
    assert "No training step" not in caplog.text
