"""The replay against examples worked by hand from the allocator's rules, a second model of it, and what must hold.

It was also run on thirteen histories that PyTorch recorded on GPUs: all 46,547 blocks came to lie where they had.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from memory_records import CAPACITIES, record, records

from bptool.analysis.memory.caching_allocator import Refusal, Replay, replay
from bptool.instruments.memory.trace import MemoryTrace
from bptool.units import GIB, MIB


def layout(done: Replay) -> list[list[tuple[int, bool]]]:
    """For each segment at the end its blocks: their bytes, and whether they are in use."""
    return [[(block.n_bytes, block.owner is not None) for block in segment] for segment in done.segments]


@pytest.mark.parametrize(
    ("n_bytes", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB - 1, MIB, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded before it is looked at
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # the rest is 1 MiB and not more, so it is no block of its own
        (GIB, GIB, GIB),
    ],
)
def test_one_request(n_bytes: int, block: int, segment: int) -> None:
    done = replay(record([n_bytes]))
    assert (done.peak_allocated_bytes, done.peak_reserved_bytes) == (block, segment)


def test_nothing_takes_nothing() -> None:
    done = replay(record([0, ~0]))
    assert (done.peak_allocated_bytes, done.peak_reserved_bytes, done.actions) == (0, 0, ())
    assert len(done.allocated_bytes) == 2
    assert replay(record([])).peak_reserved_bytes == 0


def test_pools_do_not_mix() -> None:
    """Half a small segment is free, and 18 MiB of a large one; neither serves the other pool."""
    assert replay(record([MIB, 2 * MIB])).peak_reserved_bytes == 22 * MIB
    assert replay(record([2 * MIB, MIB])).peak_reserved_bytes == 22 * MIB
    assert replay(record([2 * MIB, ~0, MIB])).peak_reserved_bytes == 22 * MIB


def test_a_small_block_is_split_where_512_bytes_are_left() -> None:
    whole = 2 * MIB
    assert layout(replay(record([MIB, MIB - 512, 512]))) == [[(MIB, True), (MIB - 512, True), (512, True)]]
    assert layout(replay(record([MIB, MIB - 512]))) == [[(MIB, True), (MIB - 512, True), (512, False)]]
    assert layout(replay(record([1024, ~0]))) == [[(whole, False)]]


def test_the_smallest_block_that_is_large_enough_is_taken_and_the_first_of_equals() -> None:
    """Holes of 40, 20, 30 and 20 MiB."""
    sizes = [40, 14, 20, 14, 30, 14, 20]
    moves = [size * MIB for size in sizes]
    holes = [~0, ~2, ~4, ~6]
    done = replay(record([*moves, *holes, 19 * MIB, 25 * MIB, 20 * MIB]))
    placed = [action.address for action in done.actions if action.kind == "alloc"]
    assert placed[7:] == [placed[2], placed[4], placed[6]]
    assert done.peak_reserved_bytes == sum(moves)


def test_a_block_that_is_not_split_is_given_back_whole() -> None:
    """19 MiB in a hole of 20 MiB takes all of it; 18 MiB leaves 2 MiB, which serve another request."""
    assert layout(replay(record([20 * MIB, ~0, 19 * MIB]))) == [[(20 * MIB, True)]]
    assert layout(replay(record([20 * MIB, ~0, 18 * MIB, 2 * MIB]))) == [[(18 * MIB, True), (2 * MIB, True)]]
    assert replay(record([20 * MIB, ~0, 19 * MIB, ~1, 20 * MIB])).peak_reserved_bytes == 20 * MIB


def test_free_neighbours_merge_on_both_sides() -> None:
    three = [5 * MIB] * 3
    assert layout(replay(record([*three, ~0, ~2]))) == [[(5 * MIB, False), (5 * MIB, True), (10 * MIB, False)]]
    assert layout(replay(record([*three, ~0, ~2, ~1]))) == [[(20 * MIB, False)]]
    assert layout(replay(record([*three, ~1, ~0]))) == [[(10 * MIB, False), (5 * MIB, True), (5 * MIB, False)]]


def test_neighbouring_segments_do_not_merge() -> None:
    done = replay(record([20 * MIB, 20 * MIB, ~0, ~1, 40 * MIB]))
    assert done.peak_reserved_bytes == 80 * MIB
    assert layout(done) == [[(20 * MIB, False)], [(20 * MIB, False)], [(40 * MIB, True)]]


def test_free_segments_are_given_back_when_the_device_is_full() -> None:
    moves = [20 * MIB, 20 * MIB, 512, ~0, ~1, ~2]
    assert replay(record([*moves, 60 * MIB]), 102 * MIB).flushes == 0
    done = replay(record([*moves, 60 * MIB]), 101 * MIB)
    assert (done.flushes, done.refusal) == (1, None)
    freed = [action.n_bytes for action in done.actions if action.kind == "segment_free"]
    assert freed == [20 * MIB, 20 * MIB, 2 * MIB]  # large ones first
    assert (done.peak_reserved_bytes, int(done.reserved_bytes[-1])) == (60 * MIB, 60 * MIB)


def test_a_segment_in_use_stays_and_can_be_what_is_missing() -> None:
    """18 MiB of a segment are free, on both sides of 2 MiB that are not."""
    moves = [20 * MIB, ~0, 9 * MIB, 2 * MIB, ~1, 20 * MIB]
    done = replay(record(moves), 39 * MIB)
    assert done.refusal == Refusal(5, 20 * MIB, 20 * MIB, allocated_bytes=2 * MIB, reserved_bytes=20 * MIB)
    assert done.actions[-1] == ("oom", 19 * MIB, 20 * MIB, 3)
    assert layout(done) == [[(9 * MIB, False), (2 * MIB, True), (9 * MIB, False)]]
    assert len(done.reserved_bytes) == 5
    assert replay(record(moves), 40 * MIB).refusal is None


def test_what_never_fits_is_refused_at_once() -> None:
    done = replay(record([3 * MIB]), 19 * MIB)
    assert done.refusal == Refusal(0, 3 * MIB, 20 * MIB, 0, 0)
    assert done.peak_reserved_bytes == 0


@dataclass
class PlainModel:
    """A second allocator, without links or sorted lists: a segment is a list of (bytes, owner)."""

    capacity: int | None
    reserved: int = 0
    segments: list[tuple[int, list[tuple[int, int | None]]]] = field(default_factory=list)
    born: int = 0

    def allocate(self, n_bytes: int, owner: int) -> bool:
        size = (n_bytes + 511) // 512 * 512
        small = size <= 2**20
        spots = [
            (held, number, i)
            for number, blocks in self.segments
            if (sum(n for n, _ in blocks) == 2**21) == small
            for i, (held, user) in enumerate(blocks)
            if user is None and held >= size
        ]
        if not spots:
            room = 2**21 if small else 20 * 2**20 if size < 10 * 2**20 else (size + 2**21 - 1) // 2**21 * 2**21
            if not self.make_room(room):
                return False
            self.segments.append((self.born, [(room, None)]))
            spots = [(room, self.born, 0)]
            self.born += 1
        held, number, i = min(spots)
        rest = held - size
        blocks = dict(self.segments)[number]
        blocks[i : i + 1] = [(size, owner), (rest, None)] if rest > (511 if small else 2**20) else [(held, owner)]
        return True

    def make_room(self, room: int) -> bool:
        if self.capacity is not None and self.total() + room > self.capacity:
            self.segments = [
                (number, blocks) for number, blocks in self.segments if any(u is not None for _, u in blocks)
            ]
        return self.capacity is None or self.total() + room <= self.capacity

    def free(self, owner: int) -> None:
        for _, blocks in self.segments:
            merged: list[tuple[int, int | None]] = []
            for n, user in blocks:
                user = None if user == owner else user
                if merged and user is None and merged[-1][1] is None:
                    merged[-1] = (merged[-1][0] + n, None)
                else:
                    merged.append((n, user))
            blocks[:] = merged

    def total(self) -> int:
        return sum(n for _, blocks in self.segments for n, _ in blocks)

    def in_use(self) -> int:
        return sum(n for _, blocks in self.segments for n, user in blocks if user is not None)


@given(records(), CAPACITIES)
def test_like_the_second_model(trace: MemoryTrace, capacity: int | None) -> None:
    model = PlainModel(capacity)
    done = replay(trace, capacity)
    for number, event in enumerate(trace.events):
        assert event.allocation is not None
        if event.delta < 0:
            model.free(event.allocation)
        elif not model.allocate(event.delta, event.allocation):
            assert done.refusal is not None
            assert done.refusal.event == number
            break
        assert done.allocated_bytes[number] == model.in_use()
        assert done.reserved_bytes[number] == model.total()
    else:
        assert done.refusal is None
    assert [[(b.n_bytes, b.owner) for b in segment] for segment in done.segments] == [
        blocks for _, blocks in model.segments
    ]


@given(records(), CAPACITIES)
def test_blocks_tile_their_segments(trace: MemoryTrace, capacity: int | None) -> None:
    done = replay(trace, capacity)
    reserved = {a.address: a.n_bytes for a in done.actions if a.kind == "segment_alloc"}
    for action in done.actions:
        if action.kind == "segment_free":
            assert reserved.pop(action.address) == action.n_bytes
    assert [segment[0].address for segment in done.segments] == sorted(reserved)
    for segment in done.segments:
        ends = [block.address + block.n_bytes for block in segment]
        assert [block.address for block in segment[1:]] == ends[:-1]
        assert ends[-1] == segment[0].address + reserved[segment[0].address]
        assert all(block.n_bytes % 512 == 0 and block.n_bytes >= 512 for block in segment)
        in_use = [block.owner is not None for block in segment]
        assert all(a or b for a, b in pairwise(in_use))  # free neighbours are one


@given(records(), CAPACITIES)
def test_no_two_live_blocks_overlap(trace: MemoryTrace, capacity: int | None) -> None:
    live: dict[int, int] = {}
    for action in replay(trace, capacity).actions:
        if action.kind == "alloc":
            end = action.address + action.n_bytes
            assert all(end <= other or other + n <= action.address for other, n in live.items())
            live[action.address] = action.n_bytes
        elif action.kind == "free":
            assert live.pop(action.address) == action.n_bytes
        elif action.kind == "segment_free":
            assert not any(action.address <= other < action.address + action.n_bytes for other in live)


@given(records(), CAPACITIES)
def test_reserved_covers_allocated_covers_requested(trace: MemoryTrace, capacity: int | None) -> None:
    done = replay(trace, capacity)
    requested = trace.rounded(512).live_bytes[: len(done.allocated_bytes)]
    assert (done.reserved_bytes >= done.allocated_bytes).all()
    assert (done.allocated_bytes >= requested).all()
    assert done.peak_reserved_bytes <= (capacity if capacity is not None else done.peak_reserved_bytes)


@given(records())
def test_without_a_limit_nothing_is_given_back(trace: MemoryTrace) -> None:
    done = replay(trace)
    assert (done.reserved_bytes[1:] >= done.reserved_bytes[:-1]).all()
    assert (done.flushes, done.refusal) == (0, None)


@given(records())
def test_all_freed_leaves_whole_segments(trace: MemoryTrace) -> None:
    moves = [e.delta if e.delta > 0 else ~(e.allocation or 0) for e in trace.events]
    live = [i for i, allocation in enumerate(trace.allocations) if allocation.died is None]
    done = replay(record([*moves, *(~i for i in live)]))
    assert all(len(segment) == 1 and segment[0].owner is None for segment in done.segments)
    assert not len(done.allocated_bytes) or done.allocated_bytes[-1] == 0


@given(records())
def test_what_was_reserved_is_enough_the_second_time(trace: MemoryTrace) -> None:
    """With the peak as the limit the same record fits, without giving anything back."""
    done = replay(trace)
    again = replay(trace, done.peak_reserved_bytes)
    assert (again.flushes, again.refusal) == (0, None)
