"""A deep model's record from shallow ones: layers are alike, so what one more layer adds every further one adds.

A record is cut into runs: stretches of events that belong to one block, one after another in a sweep through all of
them, upwards (a forward, a loop over parameters) or downwards (a backward). A deeper model's record has the same sweeps
with more runs in them, copies of an inner block's. Where an allocation outside of the blocks grows with depth (the
norms of all gradients in one tensor), two depths tell by how much. That the result is the deeper model's record is not
assumed: the extension to a third depth is compared with that depth's own record, event by event.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import groupby
from typing import NamedTuple

from bptool.analysis.like_blocks import Blocks, Copies, Lengths
from bptool.instruments.memory_trace import Allocation, Event, MemoryTrace

_BLOCK = re.compile(r"blocks\.(\d+)(?=\.|$)")


class NotPeriodic(Exception):
    """The records are no sweeps through like blocks."""


class Extended(NamedTuple):
    """A record, and the depths of those that it was made from (none: it was simulated in full)."""

    trace: MemoryTrace
    depths: tuple[int, ...]


def extended(blocks: Blocks, simulate: Callable[[Lengths], MemoryTrace]) -> Extended:
    """The record of a model with these blocks, in full only where shallow ones don't tell.

    Args:
        simulate: makes the record of the same model with stretches of these lengths.
    """
    low, high, deepest = blocks.shortened(0), blocks.shortened(0, last=1), blocks.shortened(1, last=2)
    if not blocks.is_deep(deepest):
        return Extended(simulate(blocks.lengths), ())
    try:
        extension = _Extension(blocks, low, simulate(low))
        extension.learn_slopes(high, simulate(high))
        if not same(extension.to(deepest), simulate(deepest)):
            raise NotPeriodic
        return Extended(extension.to(blocks.lengths), (sum(low), sum(high), sum(deepest)))
    except NotPeriodic:
        return Extended(simulate(blocks.lengths), ())


def same(one: MemoryTrace, other: MemoryTrace) -> bool:
    """Whether two records agree in every size, time, place and purpose (tensors' shapes are not compared)."""

    def facts(trace: MemoryTrace) -> list[tuple[object, ...]]:
        return [(a.n_bytes, a.category, a.module, a.op, a.phase, a.born, a.died) for a in trace.allocations]

    return list(one.events) == list(other.events) and facts(one) == facts(other)


class _Run(NamedTuple):
    """Events of one block, or of none, and which part of the record they are; a sweep is one part."""

    part: int
    block: int | None
    events: range


class _Place(NamedTuple):
    """Where an allocation is made: the part, the block, and the how-manieth of its run it is."""

    part: int
    block: int | None
    ordinal: int


class _Extension:
    """Makes records of deeper models from that of one with stretches of lengths `low`."""

    def __init__(self, blocks: Blocks, low: Lengths, trace: MemoryTrace) -> None:
        self._blocks, self._low, self._trace = blocks, low, trace
        self._parts = list(_parts(trace, sum(low)))
        self._slopes: dict[int, int] = {}
        self._places = {
            allocation: _Place(run.part, run.block, ordinal)
            for part in self._parts
            for run in part
            for ordinal, allocation in enumerate(_made_in(trace, run))
        }

    def learn_slopes(self, high: Lengths, trace: MemoryTrace) -> None:
        """By how much allocations outside of the blocks grow with a period more, from the record that has it.

        Raises:
            NotPeriodic: allocations of blocks differ.
        """
        ours, origins = self._extend(high)
        if len(ours.allocations) != len(trace.allocations):
            raise NotPeriodic
        for origin, mine, theirs in zip(origins, ours.allocations, trace.allocations, strict=True):
            if mine.n_bytes != theirs.n_bytes:
                if self._places[origin].block is not None:
                    raise NotPeriodic
                self._slopes[origin] = theirs.n_bytes - mine.n_bytes

    def to(self, lengths: Lengths) -> MemoryTrace:
        """The record of longer stretches."""
        return self._extend(lengths)[0]

    def _extend(self, lengths: Lengths) -> tuple[MemoryTrace, list[int]]:
        """And for each allocation the one that it copies."""
        copies = self._blocks.copies(self._low, lengths)
        upwards = {part[0].part for part in self._parts if part[0].block == 0}
        more = {allocation: copies.periods * slope for allocation, slope in self._slopes.items()}
        writer = _Writer(self._trace, self._places, more, _Ends(copies, upwards))
        for run, block in self._layout(copies):
            writer.copy(run, block)
        return MemoryTrace(writer.allocations, writer.events), writer.origins

    def _layout(self, copies: Copies) -> Iterator[tuple[_Run, int | None]]:
        """The runs of the deeper record: what is copied, and the block that it becomes."""
        for part in self._parts:
            if part[0].block is None:
                yield part[0], None
                continue
            runs = {run.block: run for run in part}
            blocks = range(copies.n_layers)
            for block in blocks if part[0].block == 0 else reversed(blocks):
                yield runs[copies.source(block)], block


class _Ends(NamedTuple):
    """Where blocks go in a deeper record.

    Attributes:
        upwards: the parts that are sweeps upwards.
    """

    copies: Copies
    upwards: Set[int]

    def moved(self, other: int, source: int | None, block: int | None, place: _Place | None) -> int:
        """The block that `other` becomes where the run of `source` becomes that of `block`.

        Seen from a block, another one is some blocks up or down. Seen from outside it is at one end of its stretch; an
        inner one's allocation (at `place`) is then one of the sweep's last, so it is nearer to the end where that went
        up.
        """
        if source is not None and block is not None:
            return other + block - source
        upwards = place is not None and place.part in self.upwards
        return self.copies.last(other) if upwards else self.copies.first(other)


class _Writer:
    """Writes runs one after another into a new record, each as some block's.

    Args:
        more: bytes that some allocations get besides; their shape is then not known.
    """

    def __init__(self, trace: MemoryTrace, places: dict[int, _Place], more: Mapping[int, int], ends: _Ends) -> None:
        self.allocations: list[Allocation] = []
        self.events: list[Event] = []
        self.origins: list[int] = []
        self._trace, self._places, self._more, self._ends = trace, places, more, ends
        self._here: dict[_Place, int] = {}
        self._names: dict[tuple[str, int | None, int | None, int | None], str] = {}

    def copy(self, run: _Run, block: int | None) -> None:
        """Append a run's events.

        Raises:
            NotPeriodic: it releases what no block like it has made.
        """
        for number in run.events:
            event = self._trace.events[number]
            if event.allocation is None:
                module = self._renamed(event.module, run.block, block, None)
                self.events.append(Event(None, 0, event.step, event.phase, module, event.op))
            elif self._trace.allocations[event.allocation].born == number:
                self._allocate(event, event.allocation, run.block, block)
            else:
                self._release(event, event.allocation, run.block, block)

    def _allocate(self, event: Event, origin: int, source: int | None, block: int | None) -> None:
        made, place, index = self._trace.allocations[origin], self._places[origin], len(self.allocations)
        more = self._more.get(origin, 0)
        n_bytes, tensor = made.n_bytes + more, "" if more else made.tensor
        owner = self._renamed(made.module, place.block, block, place)
        born = len(self.events)
        self.allocations.append(Allocation(n_bytes, made.category, owner, made.op, tensor, made.phase, born))
        self.origins.append(origin)
        self._here[_Place(place.part, block, place.ordinal)] = index
        module = self._renamed(event.module, source, block, place)
        self.events.append(Event(index, n_bytes, event.step, event.phase, module, event.op))

    def _release(self, event: Event, origin: int, source: int | None, block: int | None) -> None:
        place = self._places[origin]
        owner = None if place.block is None else self._ends.moved(place.block, source, block, place)
        index = self._here.pop(_Place(place.part, owner, place.ordinal), None)
        if index is None:
            raise NotPeriodic
        self.allocations[index].died = len(self.events)
        module = self._renamed(event.module, source, block, place)
        self.events.append(Event(index, -self.allocations[index].n_bytes, event.step, event.phase, module, event.op))

    def _renamed(self, module: str, source: int | None, block: int | None, place: _Place | None) -> str:
        if source == block and source is not None:
            return module
        key = (module, source, block, None if place is None else place.part)
        if key not in self._names:  # a run has hundreds of events in a few modules
            found = _BLOCK.match(module)
            self._names[key] = (
                f"blocks.{self._ends.moved(int(found[1]), source, block, place)}{module[found.end() :]}"
                if found
                else module
            )
        return self._names[key]


def _made_in(trace: MemoryTrace, run: _Run) -> Iterator[int]:
    for number in run.events:
        allocation = trace.events[number].allocation
        if allocation is not None and trace.allocations[allocation].born == number:
            yield allocation


def _parts(trace: MemoryTrace, depth: int) -> Iterator[list[_Run]]:
    """The record's parts in order: sweeps, each of as many runs as there are blocks, and what lies between them."""
    stretches = list(_split_at_turns(trace, _stretches(trace)))
    at, number = 0, 0
    while at < len(stretches):
        label, events = stretches[at]
        if label.block is None:
            yield [_Run(number, None, events)]
            at += 1
        else:
            runs, at = _sweep(trace, stretches, at, depth)
            yield [_Run(number, block, run) for block, run in runs]
        number += 1


class _Label(NamedTuple):
    phase: str
    block: int | None


_Stretch = tuple[_Label, range]


def _stretches(trace: MemoryTrace) -> list[_Stretch]:
    """Successive events of the same phase (recomputation being part of the backward) and the same block or none.

    A loop releases the last round's tensor in the midst of this round: that belongs to what goes on around it.
    """
    stretches: list[_Stretch] = []
    for label, group in groupby(range(len(trace.events)), lambda number: _label(trace, number)):
        numbers = list(group)
        stretches.append((label, range(numbers[0], numbers[-1] + 1)))
        if len(stretches) > 2 and stretches[-3][0] == label:
            before, between = stretches[-3][1], stretches[-2][1]
            if _only_releases(trace, between) and (label.block is None or not _only_releases(trace, before)):
                stretches[-3:] = [(label, range(before.start, numbers[-1] + 1))]
    return stretches


def _split_at_turns(trace: MemoryTrace, stretches: Sequence[_Stretch]) -> Iterator[_Stretch]:
    """Where a list is made block by block and released from its end, two sweeps meet in one block: cut them apart."""
    for i, (label, numbers) in enumerate(stretches):
        cut = 0
        inner = 0 < i < len(stretches) - 1 and label.block is not None
        if inner and stretches[i - 1][0] == stretches[i + 1][0] != (label.phase, None):
            release = [_only_releases(trace, range(number, number + 1)) for number in numbers]
            # Upwards made and downwards released, or the other way round.
            cut = len(release) - _leading(release[::-1]) if not release[0] else _leading(release)
        yield from ((label, part) for part in (numbers[:cut], numbers[cut:]) if part)


def _leading(flags: Sequence[bool]) -> int:
    """How many are true before the first that is not."""
    return next((i for i, flag in enumerate(flags) if not flag), len(flags))


def _label(trace: MemoryTrace, number: int) -> _Label:
    event = trace.events[number]
    made = event.allocation is not None and trace.allocations[event.allocation].born == number
    module = trace.allocations[event.allocation].module if made and event.allocation is not None else event.module
    found = _BLOCK.match(module)
    return _Label("backward" if event.phase == "recompute" else event.phase, int(found[1]) if found else None)


def _only_releases(trace: MemoryTrace, numbers: range) -> bool:
    events = (trace.events[number] for number in numbers)
    return all(event.allocation is not None and not event.op for event in events)


def _sweep(
    trace: MemoryTrace, stretches: Sequence[_Stretch], at: int, depth: int
) -> tuple[list[tuple[int, range]], int]:
    """The runs of the sweep that begins at a stretch, and where it ends; what follows a block's events is its own.

    A block may have none: where every k-th is recomputed, only those drop autocast's copies when a forward ends.
    """
    phase, block = stretches[at][0]
    direction = 1 if block == 0 else -1
    runs: list[tuple[int, range]] = []
    for expected in range(depth)[::direction]:
        label = _Label(phase, expected)
        if at == len(stretches) or stretches[at][0] != label:
            runs.append((expected, range(0)))
            continue
        start = at
        at += 1
        following = expected + direction if len(runs) < depth - 1 else None
        while _goes_on(trace, stretches, at, label, following):
            at += 1
        runs.append((expected, range(stretches[start][1].start, stretches[at - 1][1].stop)))
    return runs, at


def _goes_on(trace: MemoryTrace, stretches: Sequence[_Stretch], at: int, label: _Label, following: int | None) -> bool:
    """Whether a stretch is still a block's: its own, or of none where more of the block or the following one comes."""
    if at >= len(stretches) or stretches[at][0].phase != label.phase:
        return False
    if stretches[at][0] == label:
        return stretches[at - 1][0].block is None  # else the turn of two sweeps
    if stretches[at][0].block is not None or at + 1 == len(stretches):
        return False
    after, events = stretches[at + 1]
    if following is None:  # the last block: its releases are the next sweep's beginning
        return after == label and not _only_releases(trace, events)
    return after in (label, _Label(label.phase, following))
