"""Traces of operations, written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from bptool.analysis.profile.result import Duration, ModuleCost, OpCost, PhaseTimes
from bptool.analysis.profile.tally import Cost, Place, tally_of
from bptool.instruments.operations.trace import Operation, OperationTrace


def operation(op: str = "mm", **changes: Any) -> Operation:
    """A forward's product that takes nothing, with `changes` on top."""
    usual: dict[str, Any] = {
        "phase": "forward",
        "kind": "forward",
        "micro_batch": 0,
        "module": "",
        "flops": 0,
        "pointwise_flops": 0,
        "bytes_moved": 0,
        "dtype": "float32",
    }
    return Operation(op=op, **{**usual, **changes})


def costs(*operations: Operation) -> dict[Place, Cost]:
    """What they sum up to."""
    return dict(tally_of(trace(*operations), nn.Module(), 1, 1).costs)


def trace(*operations: Operation) -> OperationTrace:
    names = sorted({operation.module for operation in operations})
    return OperationTrace(operations, dict.fromkeys(names, 1), dict.fromkeys(names, "Linear"))


def times(
    *,
    data: float = 0,
    forward: float = 1,
    recompute: float | None = None,
    backward: float = 2,
    clip: float = 0,
    optimizer: float = 0,
) -> PhaseTimes:
    """One step's, in seconds."""
    inside = [data, forward, recompute or 0, backward, clip, optimizer]
    return PhaseTimes(
        step=took(sum(inside)),
        data=took(data),
        forward=took(forward),
        recompute=None if recompute is None else took(recompute),
        backward=took(backward),
        clip=took(clip),
        optimizer=took(optimizer),
        backward_over_forward=backward / forward,
        backward_over_forward_low=backward / forward,
        backward_over_forward_high=backward / forward,
    )


def took(seconds: float) -> Duration:
    return Duration(median_s=seconds, p10_s=seconds, p90_s=seconds, samples_s=[seconds])


def module_costs(*names: str) -> list[ModuleCost]:
    flops = dict.fromkeys(["forward_flops", "dgrad_flops", "wgrad_flops", "recompute_flops"], 0)
    return [
        ModuleCost(name=name, type="Linear", calls=1, parameters_count=0, bytes_moved=0, status="used", **flops)
        for name in names
    ]


def op_costs(*names: tuple[str, str]) -> list[OpCost]:
    nothing: dict[str, Any] = dict.fromkeys(["calls", "flops", "pointwise_flops", "bytes_moved"], 0)
    nothing |= dict.fromkeys(["intensity", "bound", "duration_s", "predicted_s"])
    return [OpCost(op=op, kind=kind, **nothing) for op, kind in names]


def timed_trace(*rows: tuple[str, str, float, float]) -> OperationTrace:
    """From rows of phase, module, seconds before and seconds inside; the backward's kind is dgrad."""
    return trace(*_timed(rows))


def _timed(rows: Sequence[tuple[str, str, float, float]]) -> list[Operation]:
    kinds = {"backward": "dgrad", "data": "forward", "clip": "optimizer"}
    return [
        operation(phase=phase, kind=kinds.get(phase, phase), module=module, outside_s=before, duration_s=inside)
        for phase, module, before, inside in rows
    ]
