"""`activation_checkpoint.policy=budget`: the plan of what each block keeps that fits the budget and recomputes least.

Bytes are counted on fake tensors, one block of each kind by itself. What it takes to compute a result again is measured
on the device, where a run begins, or estimated, where nothing is to be run: the plan is then part of the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from bptool.analysis.activation_budget.block_bench import Alone, BlockBench, Phases
from bptool.analysis.activation_budget.operation_costs import Costs, Estimated, InCompiled, total
from bptool.analysis.machine import Machine
from bptool.analysis.question import Question
from bptool.config.block_plan import BLOCK_POLICIES, BlockPolicy, is_alike, write_plan
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.errors import BptoolError, TargetError, UsageError
from bptool.instruments.operations.log import Operation
from bptool.training.activation_checkpoint import CHOOSERS
from bptool.training.assembly import build_model
from bptool.training.block_budget import Kind, Option, Plan, Result, Selection, Times, cheapest, least_bytes
from bptool.training.selective import Chooser, Numbering, nature
from bptool.training.user_code import describe
from bptool.training.workload import Workload
from bptool.units import MIB, format_bytes, parse_bytes

Weigh = Callable[[Mapping[int, Sequence[BlockPolicy]]], dict[int, dict[BlockPolicy, Alone]]]
"""Figures of blocks by themselves: of each kind, by its first block, treated in each of these ways."""

_ATTEMPTS = 4
"""To keep a budget to the byte, where results that are kept together hold another sum than one by one."""


class BudgetTooSmall(UsageError):
    """No plan holds as little."""


@dataclass(frozen=True)
class Planned:
    """What `budget` came to.

    Attributes:
        config: with the plan in the budget's place.
        plan: for the blocks of the whole model; its bytes are of all that the forward holds.
        budget_bytes: what was allowed.
        times: of a micro-batch.
        basis: how they are known.
    """

    config: Config
    plan: Plan
    budget_bytes: int
    times: Times
    basis: str

    @property
    def sentence(self) -> str:
        """What was chosen, and how good it is."""
        return (
            f"activation_checkpoint.plan={write_plan(self.plan.policies)}: {format_bytes(self.plan.n_bytes)} of"
            f" {format_bytes(self.budget_bytes)} at the end of the forward; recomputation adds"
            f" {self.times.overhead:.1%} to forward and backward {self.basis}, the least within"
            f" {self.plan.gap:.2%}"
        )


class Settled(NamedTuple):
    """A step that can be built: a budget has become a plan."""

    config: Config
    workload: Workload
    planned: Planned | None
    """None where there was no budget."""


def settled(config: Config, workload: Workload, machine: Machine, costs: Costs | None = None) -> Settled:
    """The same step, with a plan in the place of a budget.

    Args:
        costs: of operations; None: estimated, so that the plan is the same whenever it is asked for.

    Raises:
        BudgetTooSmall: even the most frugal plan holds more.
        TargetError: the user's model does what fake tensors cannot.
    """
    if config.activation_checkpoint.policy != "budget":
        return Settled(config, workload, None)
    try:
        found = planned(config, workload, machine, costs)
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


def planned(config: Config, workload: Workload, machine: Machine, costs: Costs | None = None) -> Planned:
    """The plan that fits `activation_checkpoint.budget`.

    Args:
        costs: of operations; None: estimated.

    Raises:
        BudgetTooSmall: even the most frugal plan holds more.
    """
    costs = costs or Estimated(machine.gpu, config.precision.mode)
    costs = InCompiled(costs) if config.training.compile else costs
    blocks = list(workload.blocks(build_model(workload, torch.device("meta"), torch.float32)))
    indices = _alike(blocks, 1 if workload.of_depth is None else workload.period)
    bench = BlockBench.of(config, workload, machine, indices)
    seen = bench.step()
    alone = bench.alone(seen.calls)
    beyond = range(bench.n_blocks, len(blocks))
    plain = {index: alone[kind[0]]["none"] for kind in indices for index in kind}
    held = seen.held + sum(plain[index].held for index in beyond)
    times = sum((_times(plain[index].phases, costs) for index in beyond), _times(seen.phases, costs))
    kinds = [Kind(tuple(kind), *_ways(alone[kind[0]], costs)) for kind in indices]
    if config.training.compile:
        kinds = [replace(kind, selection=_of_what_is_alike(kind.selection)) for kind in kinds]
    budget = parse_bytes(config.activation_checkpoint.budget)
    if held + least_bytes(kinds) > budget:
        raise _too_small(config, held + least_bytes(kinds))
    plan = _to_the_byte(kinds, budget - held, lambda ways: bench.alone(seen.calls, ways))
    plan = replace(plan, n_bytes=held + plan.n_bytes)
    return Planned(with_blocks(config, plan.policies), plan, budget, replace(times, again=plan.effort), costs.basis)


def _alike(blocks: Sequence[nn.Module], period: int) -> list[list[int]]:
    """Indices of the blocks of each kind: the same modules and parameters, at the same place in the period."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, block in enumerate(blocks):
        shapes = tuple((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())
        kinds.setdefault((str(block), shapes, index % period), []).append(index)
    return list(kinds.values())


def _times(phases: Phases, costs: Costs) -> Times:
    forward, backward, again = (total(costs, phases.get(name, ())) for name in ("forward", "backward", "recompute"))
    return Times(forward, backward, again)


def _ways(alone: Mapping[BlockPolicy, Alone], costs: Costs) -> tuple[tuple[Option, ...], Selection]:
    """The ways to treat a block, by what it holds more than where nothing is computed again."""
    plain = alone["none"].held
    options = tuple(
        Option(policy, figures.held - plain, total(costs, figures.phases.get("recompute", ())))
        for policy, figures in alone.items()
    )
    return options, _selection(alone["full"], plain, costs)


def _selection(full: Alone, plain: int, costs: Costs) -> Selection:
    """Of a block that is recomputed: each of its results but those that no recomputation gets to."""
    forward, again = full.phases.get("forward", ()), full.phases.get("recompute", ())
    counting = [operation for operation in forward if nature(operation.func).counts]
    numbered = Numbering()
    names = [numbered(operation.func) for operation in counting]
    reached = sum(nature(operation.func).counts for operation in again)
    results = [
        Result(
            name,
            operation.result_bytes,
            costs.of(operation) if place < reached else 0.0,
            nature(operation.func).draws_with(operation.call[0]),
        )
        for place, (name, operation) in enumerate(zip(names, counting, strict=True))
        if not (nature(operation.func).in_place or operation.overwritten)
    ]
    watching = costs.of_watching() * (len(forward) + len(again))
    known = {_chosen(chooser(), counting, names): policy for policy, chooser in CHOOSERS.items()}
    return Selection(full.held - plain, total(costs, again) + watching, tuple(results), known)


def _of_what_is_alike(selection: Selection | None) -> Selection | None:
    """Without results that a compiled block may have under other numbers."""
    if selection is None:
        return None
    return replace(selection, results=tuple(result for result in selection.results if is_alike(result.operation)))


def _chosen(chooser: Chooser, operations: Sequence[Operation], names: Sequence[str]) -> frozenset[str]:
    return frozenset(name for name, operation in zip(names, operations, strict=True) if chooser(operation.func))


def _to_the_byte(kinds: Sequence[Kind], room: int, weigh: Weigh) -> Plan:
    """The cheapest plan for that room; what its blocks hold is counted, where it was added up from single results."""
    if room >= 0:  # of what blocks hold more than where nothing is computed again
        return Plan(("none",) * sum(len(kind.blocks) for kind in kinds), 0, 0.0, 0.0)
    less = 0
    for _ in range(_ATTEMPTS):
        if least_bytes(kinds) > room - less:
            break
        plan = cheapest(kinds, room - less)
        n_bytes = _counted(kinds, plan, weigh)
        if n_bytes <= room:
            return replace(plan, n_bytes=n_bytes)
        less += n_bytes - room
    return cheapest([Kind(kind.blocks, kind.options) for kind in kinds], room)


def _counted(kinds: Sequence[Kind], plan: Plan, weigh: Weigh) -> int:
    """What the plan's blocks hold, to the offset of the kinds' options."""
    held = {kind.blocks[0]: {option.policy: option.n_bytes for option in kind.options} for kind in kinds}
    unknown = {
        kind.blocks[0]: sorted({plan.policies[block] for block in kind.blocks} - held[kind.blocks[0]].keys())
        for kind in kinds
    }
    weighed = weigh({first: ["none", *own] for first, own in unknown.items()}) if any(unknown.values()) else {}
    for first, alone in weighed.items():
        held[first] |= {policy: figures.held - alone["none"].held for policy, figures in alone.items()}
    return sum(held[kind.blocks[0]][plan.policies[block]] for kind in kinds for block in kind.blocks)


def with_blocks(config: Config, policies: Sequence[BlockPolicy]) -> Config:
    """The config with a plan of these; one that treats all alike is that policy, which is simulated sooner."""
    if len(set(policies)) == 1 and policies[0] in BLOCK_POLICIES:
        return override(config, {"activation_checkpoint.policy": policies[0]})
    plan = write_plan(policies)
    return override(config, {"activation_checkpoint.policy": "plan", "activation_checkpoint.plan": plan})


def _too_small(config: Config, least: int) -> BudgetTooSmall:
    enough = f"activation_checkpoint.budget={-(-least // MIB)}MiB"
    return BudgetTooSmall(
        f"activation_checkpoint.budget = {config.activation_checkpoint.budget} cannot be met: a micro-batch's forward"
        f" holds {format_bytes(least)} at the least, whatever is recomputed",
        f"{enough} can be met; smaller micro-batches or sequences need less",
    )
