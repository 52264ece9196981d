"""A budget's plan beside the other policies and PyTorch's own budget, at the memory that each of them needs.

For each rival the plan gets its bytes as its budget. Both are run in turns in one process: what is held when
the forward ends is the allocator's own account, and seconds are the processor's, of forward and backward: the fewest
of several turns, as whatever else the machine does can only add some.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
import torch._functorch.config as functorch
from step_seconds import config_of

from bptool.analysis.activation_budget.operation_costs import Costs, Estimated, Measured
from bptool.analysis.activation_budget.planning import settled
from bptool.analysis.machine import THIS_CPU
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.hardware import tune_cpu_allocator
from bptool.instruments.memory.peak import noted_allocations
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.step import TrainStep
from bptool.training.workload import Workload, transformer_workload

pytestmark = pytest.mark.benchmark
POLICIES = ("none", "save_matmuls", "save_every_other_matmul", "save_attention", "attention", "mlp", "every_k", "full")
SHARES = (0.5, 0.25, 0.1)
"""Of what is saved, as `torch._functorch.config.activation_memory_budget` has it."""
TURNS = 9
CPU = torch.device("cpu")


@dataclass
class Contestant:
    """A model that recomputes in one way; what its forward holds for its backward, and its times."""

    step: TrainStep
    held_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def best_s(self) -> float:
        """Of the turn that was disturbed least."""
        return min(self.seconds)

    def run(self) -> None:
        """Forward and backward of the same batch."""
        batch = self.step.workload.batch(torch.Generator().manual_seed(1))
        start = time.process_time()
        loss = self.step.workload.loss(self.step.model, batch)
        loss.backward()
        self.seconds.append(time.process_time() - start)
        self.step.optimizers.zero_grad()

    def weigh(self) -> None:
        """By the allocator's events of a forward."""
        gc.collect()  # what is released in it must have come in it
        batch = self.step.workload.batch(torch.Generator().manual_seed(1))
        with noted_allocations() as changes:
            loss = self.step.workload.loss(self.step.model, batch)
        self.held_bytes = sum(changes)
        loss.backward()
        self.step.optimizers.zero_grad()


def contestant(config: Config, workload: Workload) -> Contestant:
    step = build_step(config, workload, CPU, Announcer())
    step.model.train()
    return Contestant(step)


@contextmanager
def pytorchs_budget(share: float) -> Iterator[None]:
    """While it is entered, what is compiled saves no more than this share."""
    before = functorch.activation_memory_budget
    torch._dynamo.reset()
    functorch.activation_memory_budget = share
    try:
        yield
    finally:
        functorch.activation_memory_budget = before


def partitioned(config: Config, workload: Workload, backend: str) -> Contestant:
    """Blocks compiled with PyTorch's partitioner choosing what to save."""
    found = contestant(config, workload)
    for block in workload.blocks(found.step.model):
        block.forward = torch.compile(block.forward, backend=backend)
    found.run()
    return found


def planned(config: Config, workload: Workload, budget_bytes: int, costs: Costs) -> tuple[Contestant, str]:
    """And the plan in words."""
    changes = {"activation_checkpoint.policy": "budget", "activation_checkpoint.budget": f"{budget_bytes}B"}
    plan = settled(override(config, changes), workload, THIS_CPU, costs)
    chosen = plan.config.activation_checkpoint
    return contestant(plan.config, plan.workload), chosen.plan if chosen.policy == "plan" else chosen.policy


def take_turns(contestants: list[Contestant]) -> None:
    for one in contestants:
        one.run()
        one.weigh()
        one.seconds.clear()
    for _ in range(TURNS):
        for one in contestants:
            one.run()


def compared(config: Config, name: str, rival: Contestant, plain: Contestant, costs: Costs) -> None:
    """A line of the table: the rival beside the plan that had its bytes."""
    workload = transformer_workload(config)
    rival.weigh()
    plan, text = planned(config, workload, rival.held_bytes, costs)
    take_turns([plain, rival, plan])
    over_rival, over_plain = rival.best_s / plain.best_s, plan.best_s / plain.best_s
    print(
        f"{name:<28}{rival.held_bytes / 2**20:>8.2f} MiB{plan.held_bytes / 2**20:>8.2f} MiB{over_rival:>8.3f}"
        f"{over_plain:>10.3f}{plan.best_s / rival.best_s:>8.3f}   {text}",
        flush=True,
    )


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own insides
def test_beside_the_other_policies_and_pytorchs_budget() -> None:
    """At each rival's memory the plan should be no bigger, and no slower."""
    tune_cpu_allocator()
    config = config_of("small", 10, ["model.n_layers=4", "training.micro_batch_size=4"])
    workload = transformer_workload(config)
    plain, costs = contestant(config, workload), Measured(CPU, Estimated(None, "fp32"))
    print(f"\n{'':<28}{'held':>12}{'the plan':>12}{'time':>8}{'the plan':>10}{'ratio':>8}   plan")
    for policy in POLICIES:
        chosen = override(config, {"activation_checkpoint.policy": policy})
        compared(config, policy, contestant(chosen, transformer_workload(chosen)), plain, costs)
    for backend in ("aot_eager", "inductor"):
        for share in SHARES:
            with pytorchs_budget(share):
                rival = partitioned(config, workload, backend)
                compared(config, f"PyTorch's {share} ({backend})", rival, plain, costs)
