"""Seconds that it takes to count the largest preset's step, in a fresh process, imports and all."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.benchmark

_COMMAND = ("profile", "llama3-405b", "--gpu", "h100", "--count")


def test_counting_the_largest_preset() -> None:
    """Aim: 5 s on an idle machine, as a user types it. Half is imports, most of them PyTorch's.

    On a busy machine the CPU's seconds tell more; its caches are shared there all the same.
    """
    start, before = time.perf_counter(), _cpu_s()
    subprocess.run([sys.executable, "-m", "bptool", *_COMMAND], check=True, stdout=subprocess.DEVNULL)
    print(f"\nbptool {' '.join(_COMMAND)}: {time.perf_counter() - start:.1f} s, {_cpu_s() - before:.1f} s of a CPU")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
