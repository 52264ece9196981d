"""A budget's plan beside the other policies and PyTorch's own budget, at the memory that each of them needs.

For each rival the plan gets its bytes as its budget: blocks as they are beside blocks as they are, compiled ones beside
compiled ones. Rival and plan run in turns, each in its process; the ratio is the median over pairs, with its interval.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import pytest
from recomputing import CPU, PARTITIONER, config_with

from bptool.analysis.activation_budget.operation_costs import Costs, Estimated, Measured
from bptool.analysis.activation_budget.planning import settled
from bptool.analysis.machine import THIS_CPU
from bptool.analysis.profile.statistics import median_interval
from bptool.training.workload import transformer_workload

pytestmark = pytest.mark.benchmark
POLICIES = ("none", "save_matmuls", "save_every_other_matmul", "save_attention", "attention", "mlp", "every_k", "full")
SHARES = (0.5, 0.25, 0.1)
"""Of what is saved, as `torch._functorch.config.activation_memory_budget` has it."""
COMPILED = "training.compile=true"
PAIRS = 24
PROGRAM = Path(__file__).with_name("recomputing.py")


class Contestant:
    """A process that runs a model which recomputes in some way.

    Attributes:
        held_bytes: by its forward, for its backward.
    """

    def __init__(self, settings: list[str]) -> None:
        command = [sys.executable, str(PROGRAM), *settings]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.held_bytes = int(self._told("held_bytes"))

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def run(self) -> float:
        """Once more; in seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        return self._told("seconds")

    def _told(self, key: str) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process ended: see what it wrote"
        return float(json.loads(line)[key])


def pair(first: Contestant, second: Contestant) -> float:
    """The first one's time over the second's: whoever runs second finds caches that are the first's."""
    mine = first.run()
    return mine / second.run()


def planned(settings: list[str], budget_bytes: int, costs: Costs) -> list[str]:
    """The settings that the budget came to."""
    budget = ["activation_checkpoint.policy=budget", f"activation_checkpoint.budget={budget_bytes}B"]
    config = config_with([*settings, *budget])
    chosen = settled(config, transformer_workload(config), THIS_CPU, costs).config.activation_checkpoint
    plan = [f"activation_checkpoint.plan={chosen.plan}"] if chosen.policy == "plan" else []
    return [*settings, f"activation_checkpoint.policy={chosen.policy}", *plan]


def compared(name: str, rival: list[str], ours: list[str], costs: Costs) -> None:
    """A line of the table: the rival beside the plan that had its bytes."""
    with Contestant(rival) as other:
        settings = planned(ours, other.held_bytes, costs)
        with Contestant(settings) as plan:
            pair(plan, other), pair(other, plan)  # the first ones are slow
            ratios = [pair(plan, other) if even else 1 / pair(other, plan) for even in [True, False] * (PAIRS // 2)]
    low, high = median_interval(ratios)
    print(
        f"{name:<30}{other.held_bytes / 2**20:>8.2f} MiB{plan.held_bytes / 2**20:>8.2f} MiB"
        f"{statistics.median(ratios):>8.3f}  [{low:.3f}, {high:.3f}]  {settings[-1].partition('=')[2]}",
        flush=True,
    )
    assert plan.held_bytes <= other.held_bytes


@contextmanager
def table(title: str) -> Iterator[Costs]:
    print(f"\n{title:<30}{'held':>12}{'the plan':>12}{'time':>8}  {'95%':<15} plan")
    yield Measured(CPU, Estimated(None, "fp32"))


def test_beside_the_other_policies_and_pytorchs_budget() -> None:
    """At each rival's memory the plan should be no bigger, and no slower."""
    with table("as they are") as costs:
        for policy in POLICIES:
            compared(policy, [f"activation_checkpoint.policy={policy}"], [], costs)
        for share in SHARES:
            compared(f"PyTorch's {share} (aot_eager)", [f"{PARTITIONER}{share}:aot_eager"], [], costs)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_and_so_where_blocks_are_compiled() -> None:
    with table("compiled") as costs:
        for policy in POLICIES:
            compared(policy, [f"activation_checkpoint.policy={policy}", COMPILED], [COMPILED], costs)
        for share in SHARES:
            compared(f"PyTorch's {share} (inductor)", [f"{PARTITIONER}{share}:inductor"], [COMPILED], costs)
