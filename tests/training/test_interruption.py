from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from bptool.training.interruption import StopRequest

PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
from bptool.training.interruption import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.reason:
        time.sleep(0.01)
    print("asked by", stop.reason, flush=True)
    time.sleep(60 if sys.argv[1] == "hang" else 0.3)  # what is told comes from another thread
    print("saved", flush=True)
print("left", flush=True)
while sys.argv[1] == "after":  # short sleeps: a signal that comes just before a sleep is seen after it
    time.sleep(0.01)
"""


def started(what: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_work_is_finished(number: signal.Signals) -> None:
    process = started("work")
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert (out, process.returncode) == (f"asked by {number.name}\nsaved\nleft\n", 0)
    assert number.name in errors


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_leaves_at_once(second: signal.Signals) -> None:
    process = started("hang")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked by SIGINT\n"
    process.send_signal(second)
    out, errors = process.communicate(timeout=30)
    assert (out, process.returncode) == ("", 130)
    assert "stopped at once" in errors


def test_afterwards_signals_do_what_they_did_before() -> None:
    process = started("after")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    while process.stdout.readline() != "left\n":
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors


def test_handlers_are_put_back_after_an_error_too() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
