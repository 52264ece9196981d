"""How much a snapshot's device held at most, and what it held then.

A snapshot tells what is there at its end, and what was done before. Undoing that, last first, gives what was there when
the recording began; doing it again, in order, gives every moment between.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bptool.analysis.memory.caching_allocator import rounded_size, smallest_rest
from bptool.interop.memory_snapshot import Entry, Frames, Snapshot

_FREES = ("free_requested", "free_completed")  # a recording can be told to leave out either
_RESERVES = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


class LiveBlock(NamedTuple):
    """What somebody holds.

    Attributes:
        requested_bytes: as asked for.
        n_bytes: of the block that was given.
        frames: where it was asked for; empty where that was not recorded.
    """

    requested_bytes: int
    n_bytes: int
    frames: Frames


@dataclass(frozen=True)
class SnapshotPeak:
    """The moment when most was allocated; the first, if there are several.

    Attributes:
        allocated_bytes: then (`torch.cuda.max_memory_allocated`).
        reserved_bytes: the most at any moment (`torch.cuda.max_memory_reserved`).
        blocks: what was held when most was allocated.
    """

    allocated_bytes: int
    reserved_bytes: int
    blocks: Sequence[LiveBlock]


def peak_of(snapshot: Snapshot) -> SnapshotPeak:
    """The peak since the recording began; without a recording, what is there at the end.

    The bytes are those that PyTorch counts, except for blocks that were there before the recording began and are gone
    at its end: of these the file has only what was asked for. Other settings of `PYTORCH_CUDA_ALLOC_CONF` than
    `expandable_segments` can make blocks larger than is known here.
    """
    segments, live, reserved = _beginning(snapshot)
    walk = _Walk(segments, live)
    peak_reserved = reserved
    for entry in snapshot.history:
        reserved += _RESERVES.get(entry.action, 0) * entry.n_bytes
        peak_reserved = max(peak_reserved, reserved)
        walk.do(entry)
    return SnapshotPeak(walk.peak_bytes, peak_reserved, walk.blocks_at_peak())


def _beginning(snapshot: Snapshot) -> tuple[dict[int, int], dict[int, LiveBlock], int]:
    """Segments by address, live blocks by address, and the bytes reserved, before all of the history."""
    segments = {segment.address: segment.n_bytes for segment in snapshot.segments if not segment.is_expandable}
    live = {
        block.address: LiveBlock(block.requested_bytes, block.n_bytes, block.frames)
        for segment in snapshot.segments
        for block in segment.blocks
        if block.allocated
    }
    reserved = sum(segment.n_bytes for segment in snapshot.segments)
    for action, address, n_bytes, _ in reversed(snapshot.history):
        reserved -= _RESERVES.get(action, 0) * n_bytes
        if action == "alloc":
            live.pop(address, None)
        elif action in _FREES:
            live[address] = LiveBlock(n_bytes, rounded_size(n_bytes), ())
        elif action == "segment_alloc":
            segments.pop(address, None)
        elif action == "segment_free":
            segments[address] = n_bytes
    return segments, live, reserved


class _Walk:
    """Does what the history says, entry by entry."""

    def __init__(self, segments: dict[int, int], live: dict[int, LiveBlock]) -> None:
        self._segments = segments
        self._segment_addresses = sorted(segments)
        self._addresses = sorted(live)
        self._lives: dict[int, tuple[int, LiveBlock]] = {address: (0, block) for address, block in live.items()}
        self._past: list[tuple[int, int, LiveBlock]] = []
        self._now = self._peak_at = 0
        self._bytes = self.peak_bytes = sum(block.n_bytes for block in live.values())

    def do(self, entry: Entry) -> None:
        """One entry more."""
        self._now += 1
        if entry.action == "alloc":
            self._allocate(entry)
        elif entry.action in _FREES:
            self._free(entry.address)
        elif entry.action == "segment_alloc":
            self._segments[entry.address] = entry.n_bytes
            insort(self._segment_addresses, entry.address)
        elif entry.action == "segment_free" and self._segments.pop(entry.address, None) is not None:
            self._segment_addresses.remove(entry.address)

    def blocks_at_peak(self) -> list[LiveBlock]:
        """What was held when most was."""
        past = [block for born, died, block in self._past if born <= self._peak_at < died]
        return past + [block for born, block in self._lives.values() if born <= self._peak_at]

    def _allocate(self, entry: Entry) -> None:
        self._free(entry.address)  # where a recording left that out
        block = LiveBlock(entry.n_bytes, self._block_bytes(entry.address, entry.n_bytes), entry.frames)
        insort(self._addresses, entry.address)
        self._lives[entry.address] = (self._now, block)
        self._bytes += block.n_bytes
        if self._bytes > self.peak_bytes:
            self.peak_bytes, self._peak_at = self._bytes, self._now

    def _free(self, address: int) -> None:
        if address not in self._lives:
            return
        born, block = self._lives.pop(address)
        del self._addresses[bisect_left(self._addresses, address)]
        self._past.append((born, self._now, block))
        self._bytes -= block.n_bytes

    def _block_bytes(self, address: int, requested: int) -> int:
        """A request gets the whole of a free block of which too little would be left; expandable segments split all."""
        size = rounded_size(requested)
        i = bisect_right(self._segment_addresses, address) - 1
        if i < 0:
            return size
        end = self._segment_addresses[i] + self._segments[self._segment_addresses[i]]
        for neighbour in self._addresses[(j := bisect_right(self._addresses, address)) : j + 1]:
            end = min(end, neighbour)
        rest = end - address - size
        return size + rest if 0 < rest < smallest_rest(size) else size
