"""Seconds that it takes to count the largest preset's step, in a fresh process, imports and all."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.benchmark

_PROGRAM = """
from bptool.analysis.profile.counting import count_question
from bptool.analysis.profile.parts import flop_counts, module_costs, op_costs
from bptool.analysis.question import ask

counted = count_question(ask("llama3-405b", [], command="profile", device="cpu"))
flop_counts(counted.tally), module_costs(counted.tally), op_costs(counted.tally)
"""


def test_counting_the_largest_preset() -> None:
    """Aim: 5 s on an idle machine. A third is the import of torch, another what its optimizers import."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True)
    print(f"\nllama3-405b counted in {time.perf_counter() - start:.1f} s, imports included")
