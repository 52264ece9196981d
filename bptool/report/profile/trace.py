"""A recorded step as a Chrome trace: phases, the modules inside them, their operations, and what belongs to what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from bptool.files import replacing
from bptool.instruments.operations.trace import Operation, OperationTrace
from bptool.interop.chrome_trace import Count, Flow, Slice, write_chrome_trace


class _Timed(NamedTuple):
    """An operation on the trace's clock, which begins with the first of them."""

    operation: Operation
    begin_ns: int
    end_ns: int
    before_ns: int
    """Since when its phase was at it: the end of the operation before, or the phase's own beginning."""

    @property
    def middle_ns(self) -> int:
        return (self.begin_ns + self.end_ns) // 2


def write_trace(path: Path, trace: OperationTrace, *, name: str) -> None:
    """Write the file.

    Args:
        name: what was profiled.

    Raises:
        StorageError: it could not be written.
    """
    timed = _on_one_clock(trace.operations)
    with replacing(path) as unfinished:
        write_chrome_trace(
            unfinished,
            process=f"bptool profile {name}",
            thread="one training step",
            slices=_phases(timed, frozenset(trace.calls)),
            flows=_flows(timed),
            counts=_counts(timed),
        )


def _on_one_clock(operations: Sequence[Operation]) -> list[_Timed]:
    """In whole nanoseconds, so that what touches does not overlap."""
    if not operations:
        return []
    origin = operations[0].start_s - operations[0].outside_s
    found: list[_Timed] = []
    for one in operations:
        last = found[-1].end_ns if found else 0
        begin = max(last, round((one.start_s - origin) * 1e9))
        end = max(begin, round((one.start_s + one.duration_s - origin) * 1e9))
        found.append(_Timed(one, begin, end, max(last, begin - round(one.outside_s * 1e9))))
    return found


def _phases(timed: Sequence[_Timed], called: frozenset[str]) -> Iterator[Slice]:
    """Outer phases, recomputation within the backward, and what is inside each."""
    for (phase, micro_batch), group in groupby(timed, lambda one: (_outer(one.operation), one.operation.micro_batch)):
        outer = list(group)
        yield Slice(phase, "phase", outer[0].before_ns, outer[-1].end_ns, {"micro-batch": micro_batch})
        for inner, within in groupby(outer, lambda one: one.operation.phase):
            run = list(within)
            if inner != phase:
                yield Slice(inner, "phase", run[0].before_ns, run[-1].end_ns, {})
            yield from _modules([(one, _around(one.operation.module, called)) for one in run], 0)


def _outer(operation: Operation) -> str:
    return "backward" if operation.phase == "recompute" else operation.phase


def _around(module: str, called: frozenset[str]) -> tuple[str, ...]:
    """The calls that a call lies in, from the outermost to itself."""
    parts = module.split(".") if module else []
    prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return tuple(prefix for prefix in prefixes if prefix in called or prefix == module)


def _modules(run: Sequence[tuple[_Timed, tuple[str, ...]]], depth: int) -> Iterator[Slice]:
    """Slices of the calls at a depth, and below them the deeper ones and the operations."""
    for module, group in groupby(run, lambda pair: pair[1][depth] if depth < len(pair[1]) else ""):
        inside = list(group)
        if module:
            yield Slice(module, "module", inside[0][0].begin_ns, inside[-1][0].end_ns, {})
            yield from _modules(inside, depth + 1)
        else:
            yield from (_operation(timed) for timed, _ in inside)


def _operation(timed: _Timed) -> Slice:
    one = timed.operation
    details: dict[str, str | int | float] = {
        **{"for": one.kind, "module": one.module, "shapes": one.shapes, "dtype": one.dtype},
        **{"FLOPs": one.flops, "pointwise FLOPs": one.pointwise_flops, "bytes moved": one.bytes_moved},
    }
    known = {key: value for key, value in details.items() if value != ""}
    if one.node is not None:
        known["autograd node"] = one.node
    return Slice(one.op, one.kind, timed.begin_ns, timed.end_ns, known)


def _flows(timed: Sequence[_Timed]) -> Iterator[Flow]:
    """From the operation that recorded an autograd node to each that the node does in the backward."""
    recorded: dict[int, _Timed] = {}
    for one in timed:
        operation = one.operation
        if operation.node is None:
            continue
        if operation.kind in ("forward", "recompute"):
            recorded[operation.node] = one
        elif operation.phase == "backward" and (source := recorded.get(operation.node)):
            yield Flow("backward of it", source.middle_ns, one.middle_ns)


def _counts(timed: Sequence[_Timed]) -> Iterator[Count]:
    """Rates while each operation runs; nothing where a gap follows."""
    for i, one in enumerate(timed):
        seconds = (one.end_ns - one.begin_ns) / 1e9
        operation = one.operation
        work = operation.flops + operation.pointwise_flops
        amounts = {"GFLOP/s": work / 1e9, "GB/s": operation.bytes_moved / 1e9}
        for name, amount in amounts.items():
            yield Count(name, one.begin_ns, round(amount / seconds, 3) if seconds else 0.0)
            if i + 1 == len(timed) or timed[i + 1].begin_ns > one.end_ns:
                yield Count(name, one.end_ns, 0.0)
