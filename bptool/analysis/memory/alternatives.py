"""What each switch would save, and what would make it fit: the step simulated again under other settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bptool.analysis.activation_budget.planning import BudgetTooSmall
from bptool.analysis.memory.estimate import Simulated, simulated
from bptool.analysis.memory.least import least_bytes
from bptool.analysis.memory.result import Fitting, WhatIf
from bptool.analysis.question import Question
from bptool.config.block_plan import BlockPolicy
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.errors import ConfigError
from bptool.model.accounting import BlockFlops, block_flops_per_token, flops_per_token
from bptool.training.activation_checkpoint import block_policies
from bptool.training.workload import transformer_workload

Changes = dict[str, object]


@dataclass(frozen=True)
class Alternative:
    """Other settings for the same step.

    Attributes:
        changes: to the config's keys.
        same_result: whether the update is the same but for rounding.
    """

    changes: Changes
    same_result: bool = True


def what_if(question: Question) -> list[WhatIf]:
    """Every switch by itself, what saves most first; those that change nothing are told too."""
    found = [
        WhatIf(settings=words(one.changes), peak_allocated_bytes=tried.peak_bytes)
        for one in _switches(question.config)
        if (tried := attempt(question, one.changes)) is not None
    ]
    return sorted(found, key=lambda one: one.peak_allocated_bytes)


def nearest_fitting(question: Question, wanted: int = 3) -> list[Fitting]:
    """The nearest settings that fit: the same update first, then the least recomputation, then the fewest changes."""
    found: list[Fitting] = []
    for one in sorted(_combinations(question.config), key=lambda one: _cost(question.config, one)):
        tried = attempt(question, one.changes, within=question.machine.capacity_bytes)
        if tried is not None and tried.fits:
            found.append(_fitting(question, one, tried))
            if len(found) == wanted:
                break
    return found


def words(changes: Mapping[str, object]) -> list[str]:
    """As they are typed."""
    return [f"{key}={value}" for key, value in changes.items()]


def attempt(question: Question, changes: Changes, *, within: int | None = None) -> Simulated | None:
    """The step under other settings.

    None where they contradict each other or a budget, or where what every step must hold is more than `within` anyway.
    """
    try:
        config = override(question.config, changes)
    except ConfigError:
        return None
    workload = question.workload if config.run.workload else transformer_workload(config)
    if within is not None and least_bytes(config, workload) > within:
        return None
    try:
        return simulated(config, workload, question.machine)
    except BudgetTooSmall:
        return None


def _fitting(question: Question, one: Alternative, tried: Simulated) -> Fitting:
    overhead = question.machine.gpu.context.expected if question.machine.gpu else 0
    return Fitting(
        settings=words(one.changes),
        peak_allocated_bytes=tried.peak_bytes,
        total_expected_bytes=tried.reserved_bytes + overhead,
        recompute_over_model_flops=_recompute(
            tried.planned.config if tried.planned else override(question.config, one.changes)
        ),
        same_result=one.same_result,
    )


def _switches(config: Config) -> Iterator[Alternative]:
    """One change each."""
    micro, count = config.training.micro_batch_size, config.training.gradient_accumulation_steps
    yield from _lossless(config)
    for policy in ("save_matmuls", "every_k", "full"):
        if config.activation_checkpoint.policy != policy:
            yield Alternative({"activation_checkpoint.policy": policy})
    if micro % 2 == 0 and not config.run.workload:
        yield Alternative({"training.micro_batch_size": micro // 2, "training.gradient_accumulation_steps": count * 2})
    for mode in ("bf16-mixed", "bf16"):
        if config.precision.mode not in (mode, "bf16"):
            yield Alternative({"precision.mode": mode}, same_result=False)
    if config.precision.bf16_update == "master":
        yield Alternative({"precision.bf16_update": "stochastic"}, same_result=False)
    if config.optimizer.name in ("adam", "adamw", "muon"):
        yield Alternative({"optimizer.name": "adafactor", "optimizer.implementation": "auto"}, same_result=False)


def _lossless(config: Config) -> Iterator[Alternative]:
    """Changes that cost no time."""
    if config.training.loss == "plain" and not config.run.workload:
        yield Alternative({"training.loss": "fused"})
    if config.model.attention == "eager" and not config.run.workload:
        yield Alternative({"model.attention": "sdpa"})
    in_lists = config.optimizer.implementation == "foreach" or config.optimizer.name in ("muon", "adafactor")
    if in_lists and config.optimizer.implementation != "loop":
        yield Alternative({"optimizer.implementation": "loop"})


def _combinations(config: Config) -> Iterator[Alternative]:
    """Every way to split the batch and to recompute, with all that costs nothing; then with other arithmetic."""
    free: Changes = {}
    for one in _lossless(config):
        free |= one.changes
    if free:
        yield Alternative(free)
    others: list[Alternative] = [Alternative({})]
    if config.precision.mode not in ("bf16-mixed", "bf16"):
        others.append(Alternative({"precision.mode": "bf16-mixed"}, same_result=False))
    if config.precision.mode != "bf16":
        others.append(Alternative({"precision.mode": "bf16"}, same_result=False))
    if config.precision.bf16_update == "master":
        others.append(Alternative({"precision.bf16_update": "stochastic"}, same_result=False))
    if config.optimizer.name in ("adam", "adamw", "muon"):
        frugal: Changes = {"precision.mode": "bf16", "optimizer.name": "adafactor", "optimizer.implementation": "auto"}
        others.append(Alternative(frugal, same_result=False))
    for other in others:
        for policy in _policies(config):
            for split in _splits(config):
                changes = free | policy | split | other.changes
                if changes not in ({}, free):
                    yield Alternative(changes, other.same_result)


def _policies(config: Config) -> Iterator[Changes]:
    yield {}
    if config.activation_checkpoint.policy == "none":
        yield {"activation_checkpoint.policy": "save_matmuls"}
        yield {"activation_checkpoint.policy": "every_k", "activation_checkpoint.every": 2}
        yield {"activation_checkpoint.policy": "save_attention"}
    if config.activation_checkpoint.policy != "full":
        yield {"activation_checkpoint.policy": "full"}


def _splits(config: Config) -> Iterator[Changes]:
    """The same sequences a step in smaller micro-batches: as asked, halved, and one at a time."""
    yield {}
    if config.run.workload:
        return
    micro, count = config.training.micro_batch_size, config.training.gradient_accumulation_steps
    for size in dict.fromkeys(n for n in (micro // 2, 1) if n and micro % n == 0 and n < micro):
        yield {"training.micro_batch_size": size, "training.gradient_accumulation_steps": micro * count // size}


def _cost(config: Config, one: Alternative) -> tuple[bool, int, float, int]:
    """Least is nearest: the same result, the arithmetic changed least, then FLOPs, then micro-batches."""
    changed = override(config, one.changes)
    arithmetic = sum(key in one.changes for key in ("precision.mode", "precision.bf16_update", "optimizer.name"))
    return not one.same_result, arithmetic, _recompute(changed), changed.training.gradient_accumulation_steps


def _recompute(config: Config) -> float:
    """FLOPs of recomputation over those of forward and backward: a third of each recomputed block's, or of a part.

    A budget's are not known before it is a plan.
    """
    model, settings = config.model, config.activation_checkpoint
    if config.run.workload:
        return 1 / 3 if settings.policy == "full" else 0.0
    if settings.policy == "budget":
        return 0.0
    length = config.training.sequence_length
    policies = block_policies(model.n_layers, settings)
    again = sum(_again(policy, block_flops_per_token(model, i, length)) for i, policy in enumerate(policies))
    return again / flops_per_token(model, length)


def _again(policy: BlockPolicy, block: BlockFlops) -> float:
    """What of a block's forward is computed again; where some of its products are, about a half."""
    projections = block.attention_matrices + block.feed_forward
    match policy:
        case "none" | "offload" | "save_matmuls":
            return 0
        case "full":
            return projections + block.scores
        case "attention":
            return block.attention_matrices + block.scores
        case "mlp":
            return block.feed_forward
        case "save_attention":
            return projections
        case _:
            return projections / 2
