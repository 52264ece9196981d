"""What a tally says, as parts of the Result: FLOPs of the step, of each module, of each operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from bptool.analysis.profile.result import FlopCounts, ModuleCost, OpCost, PhaseCounts
from bptool.analysis.profile.tally import NOTHING, Cost, ModuleFacts, Tally
from bptool.instruments.operations.trace import Kind
from bptool.training.instrument import Phase

Status = Literal["used", "frozen", "no_backward", "unused"]


def flop_counts(tally: Tally) -> FlopCounts:
    """Of the whole step."""
    forward, dgrad, wgrad = (tally.flops(kind) for kind in ("forward", "dgrad", "wgrad"))
    optimizer = [cost for place, cost in tally.costs.items() if place.kind == "optimizer"]
    return FlopCounts(
        forward_flops=forward,
        dgrad_flops=dgrad,
        wgrad_flops=wgrad,
        recompute_flops=tally.flops("recompute"),
        optimizer_flops=sum(cost.flops + cost.pointwise_flops for cost in optimizer),
        backward_over_forward=(dgrad + wgrad) / forward if forward else None,
    )


def phase_counts(tally: Tally) -> list[PhaseCounts]:
    """Of each phase, in the step's order; what is between them is the step's own."""
    found: dict[str, Cost] = {}
    for place, cost in tally.costs.items():
        found[place.phase] = found.get(place.phase, NOTHING).plus(cost)
    return [
        PhaseCounts(
            phase=phase,
            flops=found[phase].flops,
            pointwise_flops=found[phase].pointwise_flops,
            bytes_moved=found[phase].bytes_moved,
        )
        for phase in (*get_args(Phase)[1:], "step")
        if phase in found
    ]


def module_costs(tally: Tally) -> list[ModuleCost]:
    """Of each module, in the model's order, without its submodules; what the update moves is not a module's."""
    costs = tally.by_module()
    statuses = module_statuses(tally)
    return [_module_cost(name, facts, costs.get(name, {}), statuses[name]) for name, facts in tally.modules.items()]


def op_costs(tally: Tally) -> list[OpCost]:
    """Of each operation in each kind of work, without times; those that do and move nothing (views) are left out."""
    return [
        OpCost(
            op=op,
            kind=kind,
            calls=cost.calls,
            flops=cost.flops,
            pointwise_flops=cost.pointwise_flops,
            bytes_moved=cost.bytes_moved,
            intensity=(cost.flops + cost.pointwise_flops) / cost.bytes_moved if cost.bytes_moved else None,
            bound=None,
            duration_s=None,
            predicted_s=None,
        )
        for (op, kind), cost in tally.by_op().items()
        if cost.flops or cost.pointwise_flops or cost.bytes_moved
    ]


def module_statuses(tally: Tally) -> dict[str, Status]:
    """What became of each module in this step.

    A module that does nothing itself (a list, a block) is as its submodules are: used if one of them is.
    """
    busy = {place.module for place, cost in tally.costs.items() if cost != NOTHING}
    own = {name: _own_status(facts, name in busy) for name, facts in tally.modules.items()}
    statuses: dict[str, Status] = {}
    below: dict[str, set[Status]] = {}
    for name in sorted(own, key=lambda name: -_depth(name)):  # submodules first
        found = own[name]
        if found is None:
            found = _of_submodules(below.get(name, set()), tally.modules[name])
        statuses[name] = found
        if name:
            below.setdefault(name.rpartition(".")[0], set()).add(found)
    return statuses


def _own_status(facts: ModuleFacts, busy: bool) -> Status | None:
    """None where the module itself has nothing to tell."""
    if facts.differentiated:
        return "frozen" if facts.parameters and not facts.trainable else "used"
    if facts.calls:
        return "no_backward" if busy or facts.parameters else None
    return "unused" if facts.parameters else None


def _of_submodules(found: set[Status], facts: ModuleFacts) -> Status:
    if found & {"used", "frozen"}:
        return "used"
    if "no_backward" in found:
        return "no_backward"
    return "used" if facts.calls else "unused"


def _module_cost(name: str, facts: ModuleFacts, costs: Mapping[Kind, Cost], status: Status) -> ModuleCost:
    return ModuleCost(
        name=name,
        type=facts.type,
        calls=facts.calls,
        parameters_count=facts.parameters,
        bytes_moved=sum(cost.bytes_moved for kind, cost in costs.items() if kind != "optimizer"),
        status=status,
        forward_flops=costs.get("forward", NOTHING).flops,
        dgrad_flops=costs.get("dgrad", NOTHING).flops,
        wgrad_flops=costs.get("wgrad", NOTHING).flops,
        recompute_flops=costs.get("recompute", NOTHING).flops,
    )


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0
