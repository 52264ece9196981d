"""What the recorder writes while a step runs, cheaply; and its fair copy, an `OperationTrace` for each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from bptool.instruments.operations.clock import Clock, seconds_of
from bptool.instruments.operations.trace import Kind, Operation, OperationTrace
from bptool.training.instrument import Phase


class Noted:
    """One operation, as far as it is known; what is not known when it ran is filled in later.

    Attributes:
        times: marks of the clock when it began and ended.
        parts: FLOPs of each result; None: it multiplies no matrices.
        result_bytes: of each result.
        wgrad_results: for an operation that makes both gradients, which results are the parameters'.
        stands_for: how many like operations.
        taken, made: identities of storages, of a backward's operations alone.
    """

    __slots__ = (
        "causal",
        "done",
        "dtype",
        "flops",
        "func",
        "kind",
        "made",
        "micro_batch",
        "module",
        "n_bytes",
        "node",
        "parts",
        "phase",
        "pointwise",
        "result_bytes",
        "shapes",
        "stands_for",
        "taken",
        "times",
        "wgrad_results",
    )

    def __init__(
        self,
        func: torch._ops.OpOverload,
        phase: Phase,
        times: tuple[Any, Any],
        shapes: tuple[tuple[int, ...], ...],
        dtype: torch.dtype | None,
    ) -> None:
        self.func, self.phase, self.times, self.shapes, self.dtype = func, phase, times, shapes, dtype
        self.kind: Kind = "forward"
        self.causal = False
        self.micro_batch = self.flops = self.pointwise = self.n_bytes = 0
        self.stands_for = 1
        self.module = ""
        self.node: int | None = None
        self.parts: Sequence[int] | None = None
        self.result_bytes: tuple[int, ...] = ()
        self.wgrad_results: tuple[bool, ...] = ()
        self.taken: tuple[int, ...] = ()
        self.made: tuple[int | None, ...] = ()
        self.done: Any = None  # mark of when the recorder was done with it

    @property
    def wgrad_share(self) -> tuple[int, int]:
        """The parameters' share of its costs, as a ratio: in FLOPs, or where there are none in bytes written."""
        weights = self.parts if self.flops and self.parts else self.result_bytes
        of_parameters = sum(w for w, wgrad in zip(weights, self.wgrad_results, strict=False) if wgrad)
        return of_parameters, max(sum(weights), 1)


@dataclass
class _Edge:
    """A phase's beginning or (None) the end of the innermost."""

    phase: Phase | None
    mark: Any


@dataclass
class _Step:
    entries: list[Noted | _Edge] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    differentiated: set[str] = field(default_factory=set)
    recomputed: set[str] = field(default_factory=set)


class Tape:
    """Operations and phases in order, step by step."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock
        self._steps = [_Step()]
        self.types: dict[str, str] = {}

    def begin_step(self, calls: Counter[str]) -> None:
        """What comes from here on is a new step's; `calls` is filled while it runs."""
        if self._steps[-1].entries:
            self._steps.append(_Step())
        self._steps[-1].calls = calls

    def begin(self, phase: Phase) -> None:
        """A phase begins."""
        self._steps[-1].entries.append(_Edge(phase, self._now()))

    def end(self) -> None:
        """The innermost phase ends."""
        self._steps[-1].entries.append(_Edge(None, self._now()))

    def add(self, noted: Noted) -> None:
        """An operation ran."""
        self._steps[-1].entries.append(noted)

    def done(self, noted: Noted) -> None:
        """All is noted of it: time from here on is not the recorder's. In a device's queue it takes no time anyway."""
        noted.done = self._now() if seconds_of(self._clock) is float else noted.times[1]

    def note_differentiated(self, names: Iterable[str]) -> None:
        """Modules that a backward came through."""
        self._steps[-1].differentiated |= set(names)

    def note_recomputed(self, name: str) -> None:
        """A module whose forward was run again."""
        self._steps[-1].recomputed.add(name)

    def steps(self) -> list[OperationTrace]:
        """A record for each step."""
        return [self._fair([step]) for step in self._steps if step.entries]

    def whole(self) -> OperationTrace:
        """One record of all."""
        return self._fair(self._steps)

    def _now(self) -> Any:
        return None if self._clock is None else self._clock()

    def _fair(self, steps: Sequence[_Step]) -> OperationTrace:
        operations = tuple(operation for step in steps for operation in self._operations(step))
        calls = sum((step.calls for step in steps), Counter())
        differentiated = frozenset().union(*(step.differentiated for step in steps))
        recomputed = frozenset().union(*(step.recomputed for step in steps))
        return OperationTrace(operations, dict(calls), dict(self.types), differentiated, recomputed)

    def _operations(self, step: _Step) -> Iterator[Operation]:
        if self._clock is None:
            for entry in step.entries:
                if isinstance(entry, Noted):
                    yield from _fair_copies(entry, 0.0, 0.0, 0.0)
            return
        seconds = seconds_of(self._clock)
        since = 0.0  # when the operation before, or the phase, was over with
        owed = [0.0]  # time of each open phase that no operation has been charged with yet
        for entry in reversed(step.entries):
            if isinstance(entry, _Edge):
                seconds(entry.mark)  # the last mark first: one wait for the device
                break
        for entry in step.entries:
            if isinstance(entry, Noted):
                begin, end = map(seconds, entry.times)
                yield from _fair_copies(entry, begin, end - begin, begin - since + owed[-1])
                owed[-1], since = 0.0, seconds(entry.done)
            else:
                now = seconds(entry.mark)
                owed[-1] += now - since
                if entry.phase is not None:
                    owed.append(0.0)
                elif len(owed) > 1:
                    owed.pop()
                since = now


def _fair_copies(noted: Noted, start_s: float, duration_s: float, outside_s: float) -> Iterator[Operation]:
    """One; two, one after another, where it makes both gradients."""
    if not noted.wgrad_results:
        yield _operation(noted, noted.kind, (1, 1), False, (start_s, duration_s, outside_s))
        return
    share, whole = noted.wgrad_share
    first = duration_s * (whole - share) / whole
    yield _operation(noted, "dgrad", (share, whole), False, (start_s, first, outside_s))
    yield _operation(noted, "wgrad", (share, whole), True, (start_s + first, duration_s - first, 0.0))


def _operation(
    noted: Noted, kind: Kind, share: tuple[int, int], takes: bool, seconds: tuple[float, float, float]
) -> Operation:
    """With all of its costs; or with a share of them, or (`takes` is false) with what that leaves."""

    def cut(total: int) -> int:
        taken = total * share[0] // share[1]
        return taken if takes or not noted.wgrad_results else total - taken

    return Operation(
        phase=noted.phase,
        kind=kind,
        micro_batch=noted.micro_batch,
        module=noted.module,
        op=_name(noted.func),
        flops=cut(noted.flops),
        pointwise_flops=cut(noted.pointwise),
        bytes_moved=cut(noted.n_bytes),
        shapes=_described(noted.shapes),
        dtype="" if noted.dtype is None else str(noted.dtype).removeprefix("torch."),
        node=noted.node,
        start_s=seconds[0],
        duration_s=seconds[1],
        outside_s=seconds[2],
        causal=noted.causal,
        times=noted.stands_for,
    )


@cache
def _name(func: torch._ops.OpOverload) -> str:
    return str(func.overloadpacket).rpartition(".")[2]


@cache
def _described(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " x ".join(str(list(shape)) for shape in shapes)
