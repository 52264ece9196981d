"""Run benchmark processes in turns, and set their figures side by side."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).with_name("step_seconds.py")


@dataclass(frozen=True)
class Figures:
    """Seconds of every timed step over all turns."""

    seconds: list[float]
    tokens: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best_s(self) -> float:
        return min(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.median_s


def in_turns(variants: dict[str, list[str]], turns: int = 3) -> dict[str, Figures]:
    """Run each variant's arguments, A B C A B C ..., so that a drift of the machine's speed hits all alike."""
    gathered: dict[str, Figures] = {}
    for _ in range(turns):
        for name, arguments in variants.items():
            command = [sys.executable, str(PROGRAM), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            record = json.loads(done.stdout.splitlines()[-1])
            before = gathered[name].seconds if name in gathered else []
            gathered[name] = Figures([*before, *record["seconds"]], record["tokens"])
    return gathered
