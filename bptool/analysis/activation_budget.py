"""`activation_checkpoint.policy=budget`: the plan of what each block keeps that fits the budget and recomputes least.

On fake tensors a shallow model is run once, and then one block of each kind by itself, treated in each way in turn:
what its forward leaves for its backward, and how hard the recomputation is, are that way's bytes and effort.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map  # what torch itself nests tensors with

from bptool.analysis.machine import Machine
from bptool.analysis.memory.simulation import eager_on_cpu
from bptool.analysis.question import Question
from bptool.config.block_plan import BlockPolicy, write_plan
from bptool.config.overrides import override
from bptool.config.schema import ActivationCheckpointSettings, Config
from bptool.errors import BptoolError, TargetError, UsageError
from bptool.instruments.effort import Effort
from bptool.instruments.memory_ledger import MemoryLedger
from bptool.instruments.memory_trace import MemoryTrace, total_bytes
from bptool.instruments.packed_sequences import taken_for_unpacked
from bptool.training.activation_checkpoint import SUBLAYER_POLICIES, apply, has_sublayers
from bptool.training.assembly import build_model, build_step
from bptool.training.block_budget import Kind, Option, Plan, Times, cheapest, least_bytes
from bptool.training.instrument import Announcer
from bptool.training.step import TrainStep
from bptool.training.user_code import describe
from bptool.training.workload import Workload, one, transformer_workload
from bptool.units import MIB, format_bytes, parse_bytes

_CPU = torch.device("cpu")
_CPU_FLOPS_PER_BYTE, _GPU_BYTES_PER_S = 20.0, 2e12
"""A core's matrix rate over its share of the memory's, roughly; and an A100's memory bandwidth, by its data sheet."""
_ALWAYS: tuple[BlockPolicy, ...] = ("none", "save_matmuls", "save_every_other_matmul", "save_attention", "full")


class BudgetTooSmall(UsageError):
    """No plan holds as little."""


@dataclass(frozen=True)
class Planned:
    """What `budget` came to.

    Attributes:
        config: with the plan in the budget's place.
        plan: for the blocks of the whole model; its bytes are of all that the forward holds.
        budget_bytes: what was allowed.
        times: of a micro-batch, estimated.
    """

    config: Config
    plan: Plan
    budget_bytes: int
    times: Times

    @property
    def sentence(self) -> str:
        """What was chosen, and how good it is."""
        return (
            f"activation_checkpoint.plan={write_plan(self.plan.policies)}: {format_bytes(self.plan.n_bytes)} of"
            f" {format_bytes(self.budget_bytes)} at the end of the forward; recomputation adds"
            f" {self.times.overhead:.1%} to forward and backward by a roofline estimate, the least within"
            f" {self.plan.gap:.2%}"
        )


class Settled(NamedTuple):
    """A step that can be built: a budget has become a plan."""

    config: Config
    workload: Workload
    planned: Planned | None
    """None where there was no budget."""


def settled(config: Config, workload: Workload, machine: Machine) -> Settled:
    """The same step, with a plan in the place of a budget.

    Raises:
        BudgetTooSmall: even the most frugal plan holds more.
        TargetError: the user's model does what fake tensors cannot.
    """
    if config.activation_checkpoint.policy != "budget":
        return Settled(config, workload, None)
    try:
        found = planned(config, workload, machine)
    except BptoolError:
        raise
    except Exception as error:
        if not config.run.workload:
            raise
        raise TargetError(
            f"activation_checkpoint.policy=budget runs {config.run.workload} on fake tensors, which it refuses:"
            f" {describe(error)}",
            "choose another policy",
        ) from error
    return Settled(found.config, workload, found)


def with_plan(question: Question) -> Question:
    """The same question, with a plan in the place of a budget, and what it is among the assumptions.

    Raises:
        BudgetTooSmall: even the most frugal plan holds more.
        TargetError: the user's model does what fake tensors cannot.
    """
    config, workload, found = settled(question.config, question.workload, question.machine)
    chosen = (found.sentence,) if found else ()
    return replace(question, config=config, workload=workload, assumptions=(*question.assumptions, *chosen))


def planned(config: Config, workload: Workload, machine: Machine) -> Planned:
    """The plan that fits `activation_checkpoint.budget`.

    Raises:
        BudgetTooSmall: even the most frugal plan holds more.
    """
    settings = config.activation_checkpoint
    blocks = list(workload.blocks(build_model(workload, torch.device("meta"), torch.float32)))
    kinds = _alike(blocks, 1 if workload.of_depth is None else workload.period)
    bench = _bench(config, workload, machine, kinds)
    seen = bench.step()
    alone = bench.alone(seen.calls)
    beyond = range(bench.n_blocks, len(blocks))
    plain = {index: alone[kind[0]]["none"] for kind in kinds for index in kind}
    held = seen.held + sum(plain[index].held for index in beyond)
    times = sum((plain[index].times for index in beyond), seen.times)
    options = [Kind(tuple(kind), _options(alone[kind[0]])) for kind in kinds]
    budget = parse_bytes(settings.budget)
    if held + least_bytes(options) > budget:
        raise _too_small(config, held + least_bytes(options))
    plan = cheapest(options, budget - held)
    plan = replace(plan, n_bytes=held + plan.n_bytes)
    return Planned(_with_plan(config, plan.policies), plan, budget, replace(times, again=plan.effort))


Call = tuple[Any, Any]
"""Positional and keyword arguments, with `_Shape` in the place of each tensor."""


@dataclass(frozen=True)
class _Shape:
    """A tensor to be made again."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def tensor(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, requires_grad=self.requires_grad)


@dataclass(frozen=True)
class _Seen:
    """One micro-batch of the whole model, nothing recomputed: bytes held when its forward ends, how hard its phases
    were, and how some of the blocks were called."""

    held: int
    times: Times
    calls: dict[int, Call]


@dataclass(frozen=True)
class _Alone:
    """The same of one block, treated in some way; its input is among the bytes."""

    held: int
    times: Times


@dataclass(frozen=True)
class _Bench:
    """A model on fake tensors, no deeper than it takes to see one block of each kind.

    Attributes:
        representatives: for each kind, the index of its first block in the whole model, and of one that is here.
    """

    config: Config
    workload: Workload
    machine: Machine
    n_blocks: int
    representatives: dict[int, int]

    @contextmanager
    def _built(self) -> Iterator[tuple[TrainStep, MemoryLedger, Effort]]:
        effort = Effort(_flops_per_byte(self.machine, self.config.precision.mode))
        with self.machine.simulated() as ledger:
            step = build_step(self.config, replace(self.workload, weight=one), _CPU, Announcer([ledger, effort]))
            step.model.train()
            with taken_for_unpacked(), effort:
                yield step, ledger, effort

    def step(self) -> _Seen:
        """Run one micro-batch."""
        calls: dict[int, Call] = {}
        with self._built() as (step, ledger, effort):
            blocks = self.workload.blocks(step.model)
            for index, block in ((first, blocks[here]) for first, here in self.representatives.items()):
                block.register_forward_pre_hook(partial(_note_call, calls, index), with_kwargs=True)
            with step.announcer.phase("step"):
                step.accumulate([step.workload.batch(torch.Generator())], [1])
            return _Seen(_held_by_forward(ledger.trace()), _times(effort), calls)

    def alone(self, calls: Mapping[int, Call]) -> dict[int, dict[BlockPolicy, _Alone]]:
        """One block of each kind by itself, treated in each way."""
        found: dict[int, dict[BlockPolicy, _Alone]] = {}
        with self._built() as (step, ledger, effort):
            blocks = self.workload.blocks(step.model)
            for first, call in calls.items():
                block = blocks[self.representatives[first]]
                by_name: list[BlockPolicy] = [policy for policy in SUBLAYER_POLICIES if has_sublayers(block, policy)]
                found[first] = {
                    policy: _alone(block, policy, call, step, ledger, effort) for policy in (*_ALWAYS, *by_name)
                }
        return found


def _bench(config: Config, workload: Workload, machine: Machine, kinds: list[list[int]]) -> _Bench:
    """Where the workload can be had with fewer blocks, so few that each kind has one that is not the first or last."""
    plain = override(eager_on_cpu(config), {"activation_checkpoint.policy": "none"})
    n_blocks = sum(map(len, kinds))
    enough = max(kind[0] for kind in kinds) + 3
    if workload.of_depth is not None and enough < n_blocks:
        plain = override(plain, {"model.n_layers": enough})
        workload, n_blocks = transformer_workload(plain), enough
    inner = {kind[0]: next((i for i in kind if 0 < i < n_blocks), kind[0]) for kind in kinds}
    return _Bench(plain, workload, replace(machine, fake=True), n_blocks, inner)


def _alike(blocks: Sequence[nn.Module], period: int) -> list[list[int]]:
    """Indices of the blocks of each kind: the same modules and parameters, at the same place in the period."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, block in enumerate(blocks):
        shapes = tuple((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())
        kinds.setdefault((str(block), shapes, index % period), []).append(index)
    return list(kinds.values())


def _note_call(calls: dict[int, Call], index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return _Shape(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad)

    calls[index] = tree_map(shape, (args, kwargs))


def _alone(
    block: nn.Module, policy: BlockPolicy, call: Call, step: TrainStep, ledger: MemoryLedger, effort: Effort
) -> _Alone:
    before = {module: module.__dict__.get("forward") for module in block.modules()}
    given = tree_map(lambda leaf: leaf.tensor() if isinstance(leaf, _Shape) else leaf, call)
    since = len(ledger.trace().events)
    effort.by_phase.clear()
    apply([block], ActivationCheckpointSettings(policy=policy), step.announcer)
    try:
        with step.announcer.phase("forward"), step.precision.autocast():
            # Its input is the block's to keep, or not; angles and masks are there anyway.
            args, kwargs = tree_map(lambda leaf: leaf.clone() if _has_gradient(leaf) else leaf, given)
            outputs = [leaf for leaf in tree_leaves(block(*args, **kwargs)) if _has_gradient(leaf)]
            # A sum's backward needs no tensor. Where nothing of the block is trained there is none.
            total = sum((output.sum().float() for output in outputs), torch.zeros(()))
            del args, kwargs, outputs
        held = total_bytes([a for a in ledger.trace().live_at(sys.maxsize) if a.born >= since]) - total.nbytes
        with step.announcer.phase("backward"):
            if total.requires_grad:
                total.backward()
    finally:
        step.optimizers.zero_grad()
        for module, forward in before.items():
            module.__dict__.pop("forward", None) if forward is None else setattr(module, "forward", forward)
    return _Alone(held, _times(effort))


def _times(effort: Effort) -> Times:
    return Times(effort.by_phase["forward"], effort.by_phase["backward"], effort.by_phase["recompute"])


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _held_by_forward(trace: MemoryTrace) -> int:
    forward = trace.events_of(0, "forward")
    live = trace.live_at(int(forward[-1]))
    return total_bytes([a for a in live if a.born >= forward[0] and a.phase == "forward"])


def _options(alone: Mapping[BlockPolicy, _Alone]) -> tuple[Option, ...]:
    plain = alone["none"].held
    return tuple(Option(policy, figures.held - plain, figures.times.again) for policy, figures in alone.items())


def _with_plan(config: Config, policies: list[BlockPolicy] | tuple[BlockPolicy, ...]) -> Config:
    """A plan that treats all alike is that policy, which is simulated sooner."""
    if len(set(policies)) == 1:
        return override(config, {"activation_checkpoint.policy": policies[0]})
    plan = write_plan(policies)
    return override(config, {"activation_checkpoint.policy": "plan", "activation_checkpoint.plan": plan})


def _flops_per_byte(machine: Machine, mode: str) -> float:
    if machine.gpu is None:
        return _CPU_FLOPS_PER_BYTE
    rate = {"fp32": "fp32", "tf32": "tf32"}.get(mode, "bf16")
    return machine.gpu.flops_per_s[rate] / _GPU_BYTES_PER_S


def _too_small(config: Config, least: int) -> BudgetTooSmall:
    enough = f"activation_checkpoint.budget={-(-least // MIB)}MiB"
    return BudgetTooSmall(
        f"activation_checkpoint.budget = {config.activation_checkpoint.budget} cannot be met: a micro-batch's forward"
        f" holds {format_bytes(least)} at the least, whatever is recomputed",
        f"{enough} can be met; smaller micro-batches or sequences need less",
    )
