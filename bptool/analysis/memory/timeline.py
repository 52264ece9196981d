"""A step's memory over time, thinned for a picture: a hundred thousand events become a few hundred points.

Each point stands for a bucket of neighbouring events of one phase and keeps the fullest instant of it, so no peak is
lost, neither the step's nor any phase's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from bptool.instruments.memory.trace import Allocation, Category, MemoryTrace

STACK: tuple[Category, ...] = (
    "parameters",
    "optimizer_state",
    "inputs",
    "gradients",
    "activations",
    "temporaries",
)
"""The categories from the bottom of a picture to its top: what stays longest lies lowest."""

_SMALLEST_SHARE = 0.07  # of a picture's width, for a phase of few events: enough to see it, and to name it
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Kind:
    """Tensors that are alike: of the same place in every layer.

    Attributes:
        module: dotted name; a number that differs between them is `*`.
        op, tensor: as in `Allocation`.
    """

    category: Category
    module: str
    op: str
    tensor: str


@dataclass(frozen=True)
class Share:
    """How much one kind holds at one instant.

    Attributes:
        kind: index into `Timeline.kinds`.
        count: how many storages.
    """

    kind: int
    count: int
    n_bytes: int


@dataclass(frozen=True)
class Point:
    """The fullest instant of a bucket of events.

    Attributes:
        event: number of the event within the step, from 0.
        phase: innermost phase; `step` between the phases, empty after the step.
        module, op: where and by what it came about; `op` is empty where the event releases, or is the edge of a phase.
        held_bytes: by category, in the order of `STACK`.
        largest: of what the step itself made, the kinds that hold most, the largest first.
    """

    event: int
    phase: str
    module: str
    op: str
    held_bytes: tuple[int, ...]
    largest: tuple[Share, ...]

    @property
    def total_bytes(self) -> int:
        """Everything held."""
        return sum(self.held_bytes)


@dataclass(frozen=True)
class Span:
    """One run of a phase: points `begin` to `end`, without `end`.

    Attributes:
        depth: 0 for a part of the step, 1 for what lies inside such a part, as a recompute in the backward.
    """

    phase: str
    depth: int
    begin: int
    end: int


@dataclass(frozen=True)
class Timeline:
    """A step's memory for a picture; `dataclasses.asdict` makes JSON of it.

    Attributes:
        edges: where each point begins as a share of the picture's width, and 1.0 at last. Time is counted in events,
            but a phase of very few is widened so that it can be seen.
        kinds: what the points' `largest` refers to.
        peak: index of the step's fullest point.
        phase_peaks: the same of each phase, in the order in which they begin.
        n_events: how many events there were.
    """

    edges: tuple[float, ...]
    points: tuple[Point, ...]
    spans: tuple[Span, ...]
    kinds: tuple[Kind, ...]
    peak: int
    phase_peaks: Mapping[str, int]
    n_events: int


@dataclass(frozen=True)
class _Run:
    """Neighbouring events of one phase, `begin` to `end` within the step."""

    phases: tuple[str, ...]
    begin: int
    end: int


def timeline(trace: MemoryTrace, step: int, n_points: int = 400, n_largest: int = 5) -> Timeline:
    """The memory of one step, in about `n_points` points; never fewer than one for each run of a phase."""
    events = trace.events_of(step)
    first = int(events[0])
    runs = _runs(_phases_at(trace, events))
    parts = _parts(runs)
    shares = _shares(parts)
    begins = _bucket_begins(parts, shares, n_points)
    live = trace.live_bytes[events]
    fullest = [first + b + int(live[b:e].argmax()) for b, e in zip(begins, [*begins[1:], len(events)], strict=True)]

    def point_of(event: int) -> int:
        return int(np.searchsorted(begins, event, side="right")) - 1

    kinds, points = _points(trace, fullest, first, n_largest)
    return Timeline(
        edges=_edges(parts, shares, begins),
        points=points,
        spans=tuple(Span(p, depth, point_of(b), point_of(e - 1) + 1) for p, depth, b, e in _spans(runs)),
        kinds=kinds,
        peak=point_of(trace.peak_event(step) - first),
        phase_peaks={
            phase: point_of(trace.peak_event(step, phase) - first) for phase in trace.phases_of(step) if phase != "step"
        },
        n_events=len(events),
    )


def _phases_at(trace: MemoryTrace, events: npt.NDArray[np.int64]) -> Iterator[tuple[str, ...]]:
    """The phases that each event lies in, the outermost first: an event names the innermost one, and phases nest."""
    stack: tuple[str, ...] = ()
    for i in events.tolist():
        event = trace.events[i]
        if event.allocation is None:
            ends = not event.phase or stack[-2:-1] == (event.phase,)
            stack = stack[:-1] if ends else (*stack, event.phase)
        yield stack


def _runs(phases: Iterable[tuple[str, ...]]) -> list[_Run]:
    runs, begin = [], 0
    for inside, events in groupby(phases):
        end = begin + sum(1 for _ in events)
        runs.append(_Run(inside, begin, end))
        begin = end
    return runs


def _parts(runs: Sequence[_Run]) -> list[list[_Run]]:
    """The runs, gathered into what the step is made of: its phases, each with all that lies inside, and the rest."""
    return [list(inside) for _, inside in groupby(runs, key=lambda run: run.phases[:2])]


def _spans(runs: Sequence[_Run]) -> Iterator[tuple[str, int, int, int]]:
    """Phase, depth, begin and end in events; the two outer levels."""
    for depth in (0, 1):
        for inside, group in groupby(runs, key=lambda run: run.phases[: depth + 2]):
            found = list(group)
            if len(inside) == depth + 2:
                yield inside[-1], depth, found[0].begin, found[-1].end


def _shares(parts: Sequence[Sequence[_Run]]) -> list[float]:
    """Of the picture's width: for each phase the smallest, and what is left by numbers of events."""
    named = sum(len(part[0].phases) > 1 for part in parts)
    smallest = min(_SMALLEST_SHARE, 0.5 / max(named, 1))
    left = (1 - smallest * named) / parts[-1][-1].end
    return [left * _size(part) + (smallest if len(part[0].phases) > 1 else 0.0) for part in parts]


def _size(part: Sequence[_Run]) -> int:
    return part[-1].end - part[0].begin


def _bucket_begins(parts: Sequence[Sequence[_Run]], shares: Sequence[float], n_points: int) -> list[int]:
    begins: list[int] = []
    for part, share in zip(parts, shares, strict=True):
        for run in part:
            size = run.end - run.begin
            count = min(size, max(1, round(share * n_points * size / _size(part))))
            begins += [run.begin + size * i // count for i in range(count)]
    return begins


def _edges(parts: Sequence[Sequence[_Run]], shares: Sequence[float], begins: Sequence[int]) -> tuple[float, ...]:
    """Events of one part are equally wide."""
    events, places = [0], [0.0]
    for part, share in zip(parts, shares, strict=True):
        events.append(part[-1].end)
        places.append(places[-1] + share)
    edges = np.interp([*begins, events[-1]], events, np.array(places) / places[-1])
    return tuple(round(float(edge), 6) for edge in edges)


def _points(
    trace: MemoryTrace, fullest: Sequence[int], first: int, n_largest: int
) -> tuple[tuple[Kind, ...], tuple[Point, ...]]:
    held = trace.category_bytes
    largest = _Largest(trace.allocations, first)
    points = []
    for i in fullest:
        event = trace.events[i]
        points.append(
            Point(
                event=i - first,
                phase=event.phase,
                module=event.module,
                op=event.op,
                held_bytes=tuple(int(held[category][i]) for category in STACK),
                largest=tuple(largest.at(i, n_largest)),
            )
        )
    return largest.kinds(), tuple(points)


class _Largest:
    """Which kinds hold most at an instant, of what was made since event `first`."""

    def __init__(self, allocations: Sequence[Allocation], first: int) -> None:
        allocations = [a for a in allocations if a.born >= first and a.n_bytes]
        size = len(allocations)
        self._bytes = np.fromiter((a.n_bytes for a in allocations), np.int64, size)
        self._born = np.fromiter((a.born for a in allocations), np.int64, size)
        never = np.iinfo(np.int64).max
        self._died = np.fromiter((never if a.died is None else a.died for a in allocations), np.int64, size)
        self._count = np.fromiter((a.count for a in allocations), np.int64, size)
        self._kinds, self._kind_of = _group(allocations)
        self._numbers: dict[int, int] = {}  # of the kinds that were asked for

    def at(self, event: int, count: int) -> Iterator[Share]:
        """The largest after an event, the largest first."""
        live = (self._born <= event) & (self._died > event)
        kinds = self._kind_of[live]
        totals = np.bincount(kinds, self._bytes[live], len(self._kinds))  # float64: exact up to 2^53 bytes
        counts = np.bincount(kinds, self._count[live], len(self._kinds))
        for kind in np.argsort(-totals, kind="stable")[:count].tolist():
            if totals[kind] > 0:
                number = self._numbers.setdefault(kind, len(self._numbers))
                yield Share(number, int(counts[kind]), int(totals[kind]))

    def kinds(self) -> tuple[Kind, ...]:
        """Those that were among the largest anywhere, as `Share` numbers them."""
        return tuple(self._kinds[kind] for kind in self._numbers)


def _group(allocations: Sequence[Allocation]) -> tuple[list[Kind], npt.NDArray[np.int64]]:
    """The kinds, and of which each allocation is."""
    numbers: dict[tuple[Category, str, str, str], int] = {}
    starred: dict[str, str] = {}
    modules: list[set[str]] = []
    of = []
    for a in allocations:
        if a.module not in starred:
            starred[a.module] = _NUMBER.sub("*", a.module)
        number = numbers.setdefault((a.category, starred[a.module], a.op, a.tensor), len(numbers))
        if number == len(modules):
            modules.append(set())
        modules[number].add(a.module)
        of.append(number)
    kinds = [
        Kind(category, _one(inside) or module, op, tensor)
        for (category, module, op, tensor), inside in zip(numbers, modules, strict=True)
    ]
    return kinds, np.array(of, np.int64)


def _one(modules: set[str]) -> str:
    return next(iter(modules)) if len(modules) == 1 else ""
