"""From recorded steps to seconds of modules and operations, and what of a phase's time they leave unexplained."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from bptool.analysis.profile.prediction import PHASES
from bptool.analysis.profile.recorder_cost import NOTHING_ADDED, RecorderCost
from bptool.analysis.profile.result import ModuleCost, OpCost, PhaseTimes, Unexplained
from bptool.instruments.operations.trace import Operation, OperationTrace

_OF_MODULES = ("forward", "recompute", "backward")
_KINDS = ("forward", "dgrad", "wgrad", "recompute")


def typical(
    traces: Sequence[OperationTrace], recorder: Mapping[str, RecorderCost] = MappingProxyType({})
) -> OperationTrace:
    """One trace in place of several of like steps: each operation's seconds are medians over them, by position.

    Steps that did something else (an update that was skipped, experts that were chosen otherwise) are left out: those
    are taken that are most alike, of equally many the latest.

    Args:
        traces: at least one.
        recorder: by phase, what it adds to an operation and the time before it, which is taken out again.
    """
    signatures = [tuple(map(_signature, trace.operations)) for trace in traces]
    counted = Counter(reversed(signatures))
    commonest = counted.most_common(1)[0][0]
    alike = [trace for trace, signature in zip(traces, signatures, strict=True) if signature == commonest]
    durations = _medians([operation.duration_s for operation in trace.operations] for trace in alike)
    outside = _medians([operation.outside_s for operation in trace.operations] for trace in alike)
    operations, now = [], 0.0
    for operation, duration_s, before_s in zip(alike[-1].operations, durations, outside, strict=True):
        added = recorder.get(operation.phase, NOTHING_ADDED)
        inside_s = min(max(added.together_s - before_s, 0.0), added.inside_s)
        before_s, duration_s = max(before_s - added.together_s, 0.0), max(duration_s - inside_s, 0.0)
        start_s = now + before_s
        now = start_s + duration_s
        operations.append(replace(operation, start_s=start_s, duration_s=duration_s, outside_s=before_s))
    return replace(alike[-1], operations=tuple(operations))


def _signature(operation: Operation) -> tuple[object, ...]:
    return (operation.phase, operation.kind, operation.micro_batch, operation.module, operation.op, operation.shapes)


def _medians(rows: Iterable[Sequence[float]]) -> list[float]:
    """Column by column."""
    return np.median(np.array(list(rows)), axis=0).tolist()  # type: ignore[no-any-return]


def with_seconds(modules: Sequence[ModuleCost], trace: OperationTrace) -> list[ModuleCost]:
    """The modules with their own seconds by kind: in their operations, and since the operation before each of them.

    Together they are what is explained of forward, recomputation and backward.
    """
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for operation in trace.operations:
        if operation.phase in _OF_MODULES:
            seconds[operation.module, operation.kind] += operation.outside_s + operation.duration_s
    return [
        module.model_copy(update={f"{kind}_s": seconds.get((module.name, kind), 0.0) for kind in _KINDS})
        for module in modules
    ]


def ratio_by_kind(times: PhaseTimes, trace: OperationTrace) -> float | None:
    """Backward over forward in time, gradients that the forward computes early counted as backward.

    Their share of the forward is that of the recorded operations; None where there are none.
    """
    seconds = {True: 0.0, False: 0.0}
    for operation in trace.operations:
        if operation.phase == "forward":
            seconds[operation.kind in ("dgrad", "wgrad")] += operation.outside_s + operation.duration_s
    if not (seconds[True] and seconds[False]):
        return None
    early_s = times.forward.median_s * seconds[True] / (seconds[True] + seconds[False])
    return (times.backward.median_s + early_s) / (times.forward.median_s - early_s)


def with_durations(ops: Sequence[OpCost], trace: OperationTrace) -> list[OpCost]:
    """The table of operations with the seconds inside of each."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for operation in trace.operations:
        seconds[operation.op, operation.kind] += operation.duration_s
    return [op.model_copy(update={"duration_s": seconds.get((op.op, op.kind), 0.0)}) for op in ops]


def unexplained(times: PhaseTimes, trace: OperationTrace) -> list[Unexplained]:
    """For each phase that was timed: what the operations account for, and what they do not."""
    return [_of_phase(phase, trace, found.median_s) for phase in PHASES if (found := times.of(phase))]


def _of_phase(phase: str, trace: OperationTrace, measured_s: float) -> Unexplained:
    inside = [operation for operation in trace.operations if operation.phase == phase]
    operations_s = sum(operation.duration_s for operation in inside)
    outside_s = sum(operation.outside_s for operation in inside)
    return Unexplained(
        phase=phase,
        measured_s=measured_s,
        operations_s=operations_s,
        outside_s=outside_s,
        unexplained_s=measured_s - operations_s - outside_s,
    )
