"""A budget's plan: what it says is held is held, nothing cheaper fits, and the step goes on as without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocator_events import measured_peak
from foreign_models import gpt2
from small_runs import CPU, question_of, random_batches, same_bits, small_config
from torch import Tensor, nn

from bptool.analysis.activation_budget.operation_costs import Estimated, total
from bptool.analysis.activation_budget.planning import BudgetTooSmall, Planned, planned, settled, with_plan
from bptool.analysis.closed_forms.moments import end_of_forward
from bptool.analysis.machine import THIS_CPU, Machine
from bptool.analysis.memory.alternatives import nearest_fitting
from bptool.analysis.memory.estimate import estimate, simulated
from bptool.analysis.memory.fit import predict_peak
from bptool.analysis.memory.simulation import simulate
from bptool.analysis.question import Question
from bptool.config.block_plan import BlockPolicy
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.errors import TargetError
from bptool.gpus import gpu_named
from bptool.instruments.memory.trace import total_bytes
from bptool.instruments.operations.log import OperationLog
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.workload import Workload, transformer_workload

SHAPE = {
    "model.n_layers": 6,
    "model.d_model": 32,
    "model.d_ff": 96,
    "model.context_length": 64,
    "training.micro_batch_size": 4,
    "activation_checkpoint.policy": "budget",
}
GPT = {"model.norm": "layernorm", "model.position": "learned", "model.activation": "gelu", "model.dropout": 0.1}
EXPERTS = {"model.moe.n_experts": 4, "model.moe.d_expert": 16, "model.moe.n_dense_layers": 1}
WINDOWS = {"model.sliding_window": 4, "model.sliding_window_pattern": 2}
A100 = Machine(gpu_named("a100-40gb"))


def budgeted(budget: str, changes: dict[str, Any] | None = None) -> Config:
    return small_config({**SHAPE, "activation_checkpoint.budget": budget, **(changes or {})})


def plan_for(config: Config, machine: Machine = THIS_CPU) -> Planned:
    return planned(config, transformer_workload(config), machine)


def held(config: Config, machine: Machine = THIS_CPU, workload: Workload | None = None) -> int:
    """Of the trainer's step, simulated in full: what its forward has made and still holds when it ends."""
    trace = simulate(config, workload or transformer_workload(config), machine)
    moment = end_of_forward(trace)
    return total_bytes([a for a in trace.live_at(moment.event) if a.born >= moment.since and a.phase == "forward"])


@pytest.mark.parametrize("machine", [THIS_CPU, pytest.param(A100, marks=pytest.mark.slow)], ids=["cpu", "a100"])
@pytest.mark.parametrize(
    "changes",
    [{}, GPT, {"precision.mode": "bf16"}, {"precision.mode": "bf16-mixed"}, EXPERTS, WINDOWS],
    ids=["llama", "gpt", "bf16", "autocast", "experts", "windows"],
)
def test_the_plans_bytes_are_those_of_the_step(changes: dict[str, Any], machine: Machine) -> None:
    config = budgeted("1500KiB", changes)
    found = plan_for(config, machine)
    assert found.plan.n_bytes == held(found.config, machine)
    assert 0.8 * 1500 * 1024 < found.plan.n_bytes <= 1500 * 1024
    assert len(set(found.plan.policies)) > 1
    assert 0 < found.times.overhead < 1 / 2  # of a forward and a backward that is twice as long
    assert found.plan.gap < 1e-6


def test_with_room_enough_nothing_is_recomputed_and_with_none_the_least_is_named() -> None:
    assert plan_for(budgeted("1GiB")).config.activation_checkpoint.policy == "none"
    with pytest.raises(BudgetTooSmall, match="budget = 1KiB cannot be met") as caught:
        plan_for(budgeted("1KiB"))
    enough = caught.value.remedy.partition(" ")[0].partition("=")[2]
    found = plan_for(budgeted(enough))
    full = held(override(found.config, {"activation_checkpoint.policy": "full"}))
    assert f"{full / 2**10:.2f} KiB at the least" in str(caught.value)
    assert found.plan.n_bytes <= 2**20


POLICIES: list[BlockPolicy] = ["save_matmuls", "save_every_other_matmul", "save_attention", "attention", "mlp", "full"]


class Arithmetic(Estimated):
    """Without what it takes to ask which results are kept, which `effort_of` does not see."""

    def of_watching(self) -> float:
        return 0.0


@pytest.mark.slow
def test_no_policy_that_treats_all_blocks_alike_does_better() -> None:
    """Given exactly what such a policy holds, the plan is no dearer."""
    config = budgeted("1GiB")
    for policy in POLICIES:
        uniform = override(config, {"activation_checkpoint.policy": policy})
        tight = override(config, {"activation_checkpoint.budget": str(held(uniform))})
        found = planned(tight, transformer_workload(tight), THIS_CPU, Arithmetic(None, "fp32"))
        assert found.plan.n_bytes <= held(uniform)
        assert found.plan.effort <= effort_of(uniform) * (1 + 1e-9)


def effort_of(config: Config) -> float:
    """Of recomputation in the trainer's step on fake tensors, counted apart from the planner."""
    log, costs = OperationLog(), Estimated(None, config.precision.mode)
    with THIS_CPU.simulated() as ledger:
        step = build_step(config, replace(transformer_workload(config), weight=lambda b: 1), CPU, Announcer([log]))
        with log, ledger.watching(step.model, step.optimizers):
            step.accumulate(random_batches(step, 1), [1])
    return total(costs, log.by_phase.get("recompute", ()))


def test_a_users_model_is_planned_too() -> None:
    config = small_config({"run.workload": "own.py:gpt2", "activation_checkpoint.policy": "none"})
    everything = held(config, workload=gpt2())
    tight = {"activation_checkpoint.policy": "budget", "activation_checkpoint.budget": f"{everything * 2 // 3}"}
    found = settled(override(config, tight), gpt2(), THIS_CPU)
    assert found.planned
    assert found.planned.plan.n_bytes == held(found.config, workload=gpt2()) <= everything * 2 // 3

    def gradient(chosen: Config) -> dict[str, Tensor]:
        step = build_step(chosen, gpt2(), CPU, Announcer())
        torch.manual_seed(5)
        step.accumulate(random_batches(step, 1, 2), [1, 1])
        return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}

    assert same_bits(gradient(found.config), gradient(config))


def test_blocks_that_are_not_trained_hold_nothing() -> None:
    def block(trained: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(trained)

    workload = Workload(
        lambda: nn.Sequential(*map(block, (False, False, True))),
        lambda generator: torch.randn(8, 4, generator=generator),
        lambda model, x: F.mse_loss(model(x), x),
        blocks=lambda model: list(model.children()),
    )
    own = {"run.workload": "own.py:model", "activation_checkpoint.budget": "1GiB"}
    found = planned(small_config({**SHAPE, **own}), workload, THIS_CPU)
    assert found.plan.policies == ("none",) * 3
    assert found.plan.n_bytes == held(found.config, workload=workload)


def test_a_users_model_that_reads_values_is_told_so() -> None:
    config = small_config({**SHAPE, "run.workload": "own.py:model", "activation_checkpoint.budget": "1GiB"})
    plain = transformer_workload(small_config())
    reading = replace(
        plain, of_depth=None, loss=lambda model, batch: plain.loss(model, batch) * float(batch["tokens"].sum())
    )
    with pytest.raises(TargetError, match=r"own\.py:model on fake tensors, which it refuses: .*DataDependent"):
        settled(config, reading, THIS_CPU)


def test_the_predicted_peak_is_the_measured_one() -> None:
    config = budgeted("1500KiB", {"optimizer.name": "sgd", "model.dropout": 0.1})
    workload = transformer_workload(config)
    found = settled(config, workload, THIS_CPU)
    assert predict_peak(question_of(config, workload)).peak_bytes == measured_peak(found.config, workload)


def test_the_estimate_tells_the_plan_and_alternatives_come_with_theirs() -> None:
    config = budgeted("1500KiB")
    question = Question("tiny", (), config, transformer_workload(config), replace(THIS_CPU, capacity_bytes=2**21))
    step = simulated(config, question.workload, question.machine)
    assert step.planned
    assert any(line.startswith("activation_checkpoint.plan=") for line in estimate(question, step).assumptions)
    assert all(one.total_expected_bytes <= 2**21 for one in nearest_fitting(question, wanted=1))


def test_the_plan_is_among_what_a_question_takes_for_granted() -> None:
    config = budgeted("1500KiB")
    question = Question("tiny", (), config, transformer_workload(config), THIS_CPU, assumptions=("before",))
    asked = with_plan(question)
    assert asked.assumptions == ("before", planned(config, question.workload, THIS_CPU).sentence)
    assert with_plan(replace(question, config=asked.config)).assumptions == ("before",)
