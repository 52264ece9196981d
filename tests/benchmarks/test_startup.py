"""How long the command line takes to answer."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.benchmark


def _seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def test_help() -> None:
    """Aim: under 0.5 s, of which the interpreter's own start is the smallest part that nobody can save."""
    empty = statistics.median(_seconds("-c", "pass") for _ in range(7))
    print(f"\nstart-up (python alone {empty * 1e3:.0f} ms)")
    for command in ([], ["train"], ["sample"], ["export"]):
        taken = statistics.median(_seconds("-m", "bptool", *command, "--help") for _ in range(7))
        words = " ".join(["bptool", *command, "--help"])
        share = taken / 0.5
        print(f"  {words:<24}{taken * 1e3:>7.0f} ms{share:>8.0%} of half a second")
