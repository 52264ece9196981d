"""A deep model's record from shallow ones: layers are alike, so what one more layer adds every further one adds.

A record is cut into runs: stretches of events that belong to one block, one after another in a sweep through all of
them, upwards (a forward, a loop over parameters) or downwards (a backward). A deeper model's record has the same sweeps
with more runs in them, copies of an inner block's. Where an allocation outside of the blocks grows with depth (the
norms of all gradients in one tensor), two depths tell by how much. That the result is the deeper model's record is not
assumed: the extension to a third depth is compared with that depth's own record, event by event.

Of a very deep model some blocks are written out and the others told in bundles between them: what so many blocks leave
and release, in one piece. What is held grows in a straight line from one block of a sweep to the next, so the fullest
instant is in the first or the last of them, which are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import NamedTuple

from bptool.analysis.like_blocks import Blocks, Bundle, Copies, Lengths, Outline
from bptool.analysis.memory.sweeps import BLOCK, Run, in_block, made_in, parts
from bptool.instruments.memory.trace import Allocation, Event, MemoryTrace


class NotPeriodic(Exception):
    """The records are no sweeps through like blocks."""


_WRITTEN_OUT = 64  # blocks of each stretch


class Beyond(NamedTuple):
    """For what does not follow from sums, such as memory between an allocator's blocks: it has to be extended itself.

    Attributes:
        shorter: the record of a model with half of the blocks that are written out.
        periods: how many more periods are written out than `shorter` has.
        left_out: how many are in bundles.
    """

    shorter: MemoryTrace
    periods: int
    left_out: int


class Extended(NamedTuple):
    """A record, and what it was made from.

    Attributes:
        depths: of the models that were simulated; none where it was the model itself.
        beyond: None where every block is written out.
        write_out: makes the record with every block written out.
    """

    trace: MemoryTrace
    depths: tuple[int, ...]
    beyond: Beyond | None = None
    write_out: Callable[[], MemoryTrace] | None = None

    def whole(self) -> MemoryTrace:
        """The record with every block written out, which takes as much longer as there are more of them."""
        return self.trace if self.write_out is None else self.write_out()


def extended(blocks: Blocks, simulate: Callable[[Lengths], MemoryTrace], most: int = _WRITTEN_OUT) -> Extended:
    """The record of a model with these blocks, in full only where shallow ones don't tell.

    Args:
        simulate: makes the record of the same model with stretches of these lengths.
        most: how many blocks of a stretch are written out.
    """
    low, high, deepest = blocks.shortened(0), blocks.shortened(0, last=1), blocks.shortened(1, last=2)
    if not blocks.is_deep(deepest):
        return Extended(simulate(blocks.lengths), ())
    try:
        extension = _Extension(blocks, low, simulate(low))
        extension.learn_slopes(high, simulate(high))
        if not same(extension.to(deepest), simulate(deepest)):
            raise NotPeriodic
        return extension.extended(most, (sum(low), sum(high), sum(deepest)))
    except NotPeriodic:
        return Extended(simulate(blocks.lengths), ())


def same(one: MemoryTrace, other: MemoryTrace) -> bool:
    """Whether two records agree in every size, time, place and purpose (tensors' shapes are not compared)."""

    def facts(trace: MemoryTrace) -> list[tuple[object, ...]]:
        return [(a.n_bytes, a.category, a.module, a.op, a.phase, a.born, a.died) for a in trace.allocations]

    return list(one.events) == list(other.events) and facts(one) == facts(other)


def modules_of(allocation: Allocation) -> list[str]:
    """The module of each storage that it stands for."""
    if allocation.blocks is None:
        return [allocation.module]
    return [in_block(allocation.module, number) for number in allocation.blocks]


class _Place(NamedTuple):
    """Where an allocation is made: the part, the block, and the how-manieth of its run it is."""

    part: int
    block: int | None
    ordinal: int


class _Extension:
    """Makes records of deeper models from that of one with stretches of lengths `low`."""

    def __init__(self, blocks: Blocks, low: Lengths, trace: MemoryTrace) -> None:
        self._blocks, self._low, self._trace = blocks, low, trace
        self._parts = list(parts(trace, sum(low)))
        self._slopes: dict[int, int] = {}
        self._places = {
            allocation: _Place(run.part, run.block, ordinal)
            for part in self._parts
            for run in part
            for ordinal, allocation in enumerate(made_in(trace, run))
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

    def extended(self, most: int, depths: tuple[int, ...]) -> Extended:
        """The record of the model itself, at most so many blocks of a stretch written out."""
        full = self._blocks.lengths
        outline, shorter = self._blocks.outline(most), self._blocks.outline(most // 2).lengths
        if not outline.bundles:
            return Extended(self.to(full), depths)
        periods = [self._blocks.copies(self._low, lengths).periods for lengths in (shorter, outline.lengths, full)]
        beyond = Beyond(self.to(shorter), periods[1] - periods[0], periods[2] - periods[1])
        return Extended(self._extend(outline.lengths, outline)[0], depths, beyond, partial(self.to, full))

    def _extend(self, lengths: Lengths, outline: Outline | None = None) -> tuple[MemoryTrace, list[int]]:
        """And for each allocation the one that it copies; of a bundle's there is none."""
        copies = self._blocks.copies(self._low, lengths)
        periods = copies.periods if outline is None else self._blocks.copies(self._low, self._blocks.lengths).periods
        upwards = {part[0].part for part in self._parts if part[0].block == 0}
        more = {allocation: periods * slope for allocation, slope in self._slopes.items()}
        ends = _Ends(copies, upwards, range(copies.n_layers) if outline is None else outline.numbers)
        writer = _Writer(self._trace, self._places, more, ends)
        for part in self._parts:
            if part[0].block is None:
                writer.copy(part[0], None)
            else:
                self._sweep(writer, part, copies, {} if outline is None else outline.bundles)
        return MemoryTrace(writer.allocations, writer.events), writer.origins

    def _sweep(self, writer: _Writer, part: Sequence[Run], copies: Copies, bundles: Mapping[int, Bundle]) -> None:
        """Write a part of the deeper record: each block's copy of a run, and the bundles between them."""
        runs = {run.block: run for run in part}
        upwards = part[0].block == 0
        blocks = range(copies.n_layers)
        for block in blocks if upwards else reversed(blocks):
            bundle = bundles.get(block)
            period = bundle and [runs[copies.source(other)] for other in range(block - bundle.period + 1, block + 1)]
            if bundle and period and not upwards:
                writer.bundle(period, bundle)
            writer.copy(runs[copies.source(block)], block)
            if bundle and period and upwards:
                writer.bundle(period, bundle)


class _Ends(NamedTuple):
    """Where blocks go in a deeper record.

    Attributes:
        upwards: the parts that are sweeps upwards.
        numbers: what number each written block has in the model.
    """

    copies: Copies
    upwards: Set[int]
    numbers: Sequence[int]

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

    def __init__(
        self,
        trace: MemoryTrace,
        places: Mapping[int, _Place],
        more: Mapping[int, int],
        ends: _Ends,
    ) -> None:
        self.allocations: list[Allocation] = []
        self.events: list[Event] = []
        self.origins: list[int] = []
        self._trace, self._places, self._more, self._ends = trace, places, more, ends
        self._here: dict[_Place, int] = {}
        self._bundled: dict[tuple[Bundle, _Place], int] = {}
        self._names: dict[tuple[str, int | None, int | None, int | None], str] = {}

    def copy(self, run: Run, block: int | None) -> None:
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

    def bundle(self, runs: Sequence[Run], bundle: Bundle) -> None:
        """Append what a bundle of blocks like these runs' changes for good, in one piece.

        What one of them makes and it or the next one releases is left out. What goes comes first, so that nothing is
        on top of what stays.

        Raises:
            NotPeriodic: they release what no block like them has made.
        """
        made, gone = self._changes(runs)
        for place, number in gone.items():
            if place not in made:
                self._release_bundle(number, bundle, place)
        for place, number in made.items():
            if place not in gone:
                self._allocate_bundle(number, bundle, place)

    def _changes(self, runs: Sequence[Run]) -> tuple[dict[_Place, int], dict[_Place, int]]:
        """The events that allocate and that release, by what; a neighbouring block's is as good as the like block's."""
        made: dict[_Place, int] = {}
        gone: dict[_Place, int] = {}
        first = runs[0].block
        for number in (number for run in runs for number in run.events):
            index = self._trace.events[number].allocation
            if index is not None:
                place = self._places[index]
                assert place.block is not None
                assert first is not None
                like = place._replace(block=(place.block - first) % len(runs))
                (made if self._trace.allocations[index].born == number else gone)[like] = number
        return made, gone

    def _allocate_bundle(self, number: int, bundle: Bundle, place: _Place) -> None:
        event, index = self._trace.events[number], len(self.allocations)
        assert event.allocation is not None
        assert place.block is not None
        one, blocks = self._trace.allocations[event.allocation], bundle.numbers[place.block :: bundle.period]
        n_bytes, module, born = one.n_bytes * len(blocks), in_block(one.module, blocks[0]), len(self.events)
        many = Allocation(n_bytes, one.category, module, one.op, one.tensor, one.phase, born, None, blocks)
        self.allocations.append(many)
        self._bundled[bundle, place] = index
        self.events.append(Event(index, n_bytes, event.step, event.phase, module, event.op))

    def _release_bundle(self, number: int, bundle: Bundle, place: _Place) -> None:
        event, index = self._trace.events[number], self._bundled.pop((bundle, place), None)
        if index is None:
            raise NotPeriodic
        many = self.allocations[index]
        many.died = len(self.events)
        self.events.append(Event(index, -many.n_bytes, event.step, event.phase, many.module, event.op))

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
        if source is not None and source == block == self._ends.numbers[source]:
            return module
        key = (module, source, block, None if place is None else place.part)
        if key not in self._names:  # a run has hundreds of events in a few modules
            found = BLOCK.match(module)
            moved = self._ends.moved(int(found[1]), source, block, place) if found else 0
            self._names[key] = in_block(module, self._ends.numbers[moved])
        return self._names[key]
