"""What PyTorch's CUDA allocator would do with a record of allocations: the segments it reserves, the blocks in them.

The rules are those of the native allocator at its default settings, in PyTorch's c10/cuda/CUDACachingAllocator.cpp and
c10/core/AllocatorConfig.h:

    rounding     every request is rounded up to 512 bytes; a request of nothing takes nothing
    pools        up to 1 MiB: small; beyond: large. A block serves its own pool only
    reuse        the smallest free block that is large enough, at the lowest address
    segments     where none is: 2 MiB for the small pool; for the large one 20 MiB if the request is below 10 MiB, and
                 the request rounded up to 2 MiB if not
    splitting    what a request leaves of a block becomes a free block where it has 512 bytes or more (small pool), or
                 more than 1 MiB (large pool); else the request gets it all
    release      a free block merges with its free neighbours; the segment stays reserved
    full         where a segment does not fit on the device, every segment that is free as a whole goes back to it, and
                 the request is tried once more (only `max_split_size_mb` makes it try with a few of them first)

Not modelled: several streams, private pools of CUDA graphs, `expandable_segments` and the other settings of
`PYTORCH_CUDA_ALLOC_CONF`, and where in memory the device puts a segment (here: after all earlier ones).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from bptool.instruments.memory.trace import MemoryTrace
from bptool.units import MIB

ROUNDING_BYTES = 512
LARGEST_SMALL_REQUEST = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
SMALLEST_OWN_SEGMENT = 10 * MIB
SHARED_SEGMENT_BYTES = 20 * MIB
OWN_SEGMENT_ROUNDING_BYTES = 2 * MIB
FIRST_ADDRESS = 0x7F00_0000_0000  # about where CUDA puts memory; viewers show addresses in hexadecimal


def rounded_size(n_bytes: int) -> int:
    """Bytes of the block that is looked for; 0 for nothing."""
    return -(-n_bytes // ROUNDING_BYTES) * ROUNDING_BYTES


def segment_size(block_bytes: int) -> int:
    """Bytes of the segment that is reserved for a block of a rounded size."""
    if block_bytes <= LARGEST_SMALL_REQUEST:
        return SMALL_SEGMENT_BYTES
    if block_bytes < SMALLEST_OWN_SEGMENT:
        return SHARED_SEGMENT_BYTES
    return -(-block_bytes // OWN_SEGMENT_ROUNDING_BYTES) * OWN_SEGMENT_ROUNDING_BYTES


def smallest_rest(block_bytes: int) -> int:
    """Bytes that a block of a rounded size has to leave for the rest to be a block of its own."""
    return ROUNDING_BYTES if block_bytes <= LARGEST_SMALL_REQUEST else LARGEST_SMALL_REQUEST + 1


class Block:
    """A part of a segment: in use for one request, or free.

    Attributes:
        address: of its first byte.
        n_bytes: its length; a request may be shorter.
        requested_bytes: what was asked for; 0 where it is free.
        owner: the caller's number for the request; None where it is free.
        pool: where it goes when it is free.
        before: its neighbour at lower addresses, None at the beginning of the segment.
        after: its neighbour at higher addresses, None at the end.
    """

    __slots__ = ("address", "after", "before", "n_bytes", "owner", "pool", "requested_bytes")

    def __init__(self, address: int, n_bytes: int, pool: Pool) -> None:
        self.address, self.n_bytes, self.pool = address, n_bytes, pool
        self.requested_bytes = 0
        self.owner: int | None = None
        self.before: Block | None = None
        self.after: Block | None = None

    @property
    def is_whole_segment(self) -> bool:
        """Whether it has no neighbour."""
        return self.before is None and self.after is None

    def onwards(self) -> Iterator[Block]:
        """It and what follows in its segment."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.after

    def split(self, n_bytes: int) -> Block:
        """Keep so many bytes; the rest is a new block after it."""
        rest = Block(self.address + n_bytes, self.n_bytes - n_bytes, self.pool)
        self.n_bytes = n_bytes
        rest.before, rest.after = self, self.after
        if rest.after is not None:
            rest.after.before = rest
        self.after = rest
        return rest

    def absorb_after(self) -> None:
        """Become one with the neighbour after it, which has to be free and in no pool."""
        assert self.after is not None
        self.n_bytes += self.after.n_bytes
        self.after = self.after.after
        if self.after is not None:
            self.after.before = self


class Pool:
    """The free blocks of one kind of request, by size and then by address."""

    def __init__(self, *, is_large: bool) -> None:
        self.is_large = is_large
        self._free: list[tuple[int, int, Block]] = []

    def add(self, block: Block) -> None:
        """A block is free."""
        insort(self._free, (block.n_bytes, block.address, block))

    def remove(self, block: Block) -> None:
        """A free block is so no more."""
        del self._free[bisect_left(self._free, (block.n_bytes, block.address))]

    def take(self, n_bytes: int) -> Block | None:
        """The best free block for a size, taken out; None where none is large enough."""
        i = bisect_left(self._free, (n_bytes,))
        return self._free.pop(i)[2] if i < len(self._free) else None

    def take_whole_segments(self) -> list[Block]:
        """The free blocks without neighbours, all taken out."""
        whole = [block for _, _, block in self._free if block.is_whole_segment]
        self._free = [entry for entry in self._free if not entry[2].is_whole_segment]
        return whole


ActionKind = Literal["segment_alloc", "segment_free", "alloc", "free", "oom"]


class Action(NamedTuple):
    """One thing that the allocator did.

    Attributes:
        kind: reserve a segment, give it back to the device, allocate, free, or refuse.
        address: of the segment or block; for a refusal, the bytes that the device had left.
        n_bytes: of the segment, or as requested; for a refusal, as requested and rounded.
        owner: the request that it was done for.
    """

    kind: ActionKind
    address: int
    n_bytes: int
    owner: int


class CachingAllocator:
    """The allocator: `allocate` and `free`, and a record of what it did.

    Args:
        capacity_bytes: how much it may reserve; None: without limit.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self._capacity = capacity_bytes
        self._small, self._large = Pool(is_large=False), Pool(is_large=True)
        self._segments: dict[int, Block] = {}  # by address, the first block, which stays the same object
        self._next_address = FIRST_ADDRESS
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.flushes = 0
        self.actions: list[Action] = []

    def allocate(self, n_bytes: int, owner: int) -> Block | None:
        """A block for a request of one byte or more; None where the device is full."""
        size = rounded_size(n_bytes)
        pool = self._small if size <= LARGEST_SMALL_REQUEST else self._large
        block = pool.take(size) or self._reserve(size, pool, owner)
        if block is None:
            return None
        if block.n_bytes - size >= smallest_rest(size):
            pool.add(block.split(size))
        block.requested_bytes, block.owner = n_bytes, owner
        self.allocated_bytes += block.n_bytes
        self.actions.append(Action("alloc", block.address, n_bytes, owner))
        return block

    def free(self, block: Block) -> None:
        """Take a block back; it merges with its free neighbours."""
        assert block.owner is not None
        self.allocated_bytes -= block.n_bytes
        self.actions.append(Action("free", block.address, block.requested_bytes, block.owner))
        block.requested_bytes, block.owner = 0, None
        if block.after is not None and block.after.owner is None:
            block.pool.remove(block.after)
            block.absorb_after()
        if block.before is not None and block.before.owner is None:
            block = block.before
            block.pool.remove(block)
            block.absorb_after()
        block.pool.add(block)

    def segments(self) -> list[list[Block]]:
        """The blocks of each segment that is reserved now, in the order of their addresses."""
        return [list(first.onwards()) for first in self._segments.values()]

    def _reserve(self, size: int, pool: Pool, owner: int) -> Block | None:
        n_bytes = segment_size(size)
        if not self._fits(n_bytes):
            self._give_back_free_segments(owner)
            if not self._fits(n_bytes):
                assert self._capacity is not None
                self.actions.append(Action("oom", self._capacity - self.reserved_bytes, size, owner))
                return None
        block = Block(self._next_address, n_bytes, pool)
        self._next_address += n_bytes
        self._segments[block.address] = block
        self.reserved_bytes += n_bytes
        self.actions.append(Action("segment_alloc", block.address, n_bytes, owner))
        return block

    def _fits(self, n_bytes: int) -> bool:
        return self._capacity is None or self.reserved_bytes + n_bytes <= self._capacity

    def _give_back_free_segments(self, owner: int) -> None:
        self.flushes += 1
        for block in [*self._large.take_whole_segments(), *self._small.take_whole_segments()]:
            del self._segments[block.address]
            self.reserved_bytes -= block.n_bytes
            self.actions.append(Action("segment_free", block.address, block.n_bytes, owner))


@dataclass(frozen=True)
class Refusal:
    """The request that the device has no room for, even with every free segment given back.

    Attributes:
        event: of the record.
        requested_bytes: rounded up to 512.
        segment_bytes: what would have to be reserved for it; PyTorch's message says that it "tried to allocate" this.
        allocated_bytes: in use at that moment.
        reserved_bytes: reserved at that moment; what is reserved and not in use lies between blocks that are.
    """

    event: int
    requested_bytes: int
    segment_bytes: int
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, eq=False)
class Replay:
    """A record as the allocator sees it, to its end or until a request is refused, which ends a run.

    Attributes:
        allocated_bytes: in blocks, after each event (`torch.cuda.memory_allocated`); none from a refusal on.
        reserved_bytes: in segments, likewise (`torch.cuda.memory_reserved`).
        flushes: how often free segments were given back, for want of room.
        refusal: the request that found no room; None where it all fits.
        actions: what was done, in order; an owner is the index of an allocation of the record.
        segments: the blocks of each segment that is reserved at the end.
        block_bytes: size of the block that each allocation of the record got, up to a refusal; a little more than was
            asked for where the rest was too small to be split off.
    """

    allocated_bytes: npt.NDArray[np.int64]
    reserved_bytes: npt.NDArray[np.int64]
    flushes: int
    refusal: Refusal | None
    actions: Sequence[Action]
    segments: Sequence[Sequence[Block]]
    block_bytes: Mapping[int, int]

    @property
    def peak_allocated_bytes(self) -> int:
        """As `torch.cuda.max_memory_allocated`."""
        return int(self.allocated_bytes.max(initial=0))

    @property
    def peak_reserved_bytes(self) -> int:
        """As `torch.cuda.max_memory_reserved`."""
        return int(self.reserved_bytes.max(initial=0))


def replay(trace: MemoryTrace, capacity_bytes: int | None = None) -> Replay:
    """Run a record through the allocator.

    Args:
        trace: the record; its allocations not rounded. Many like blocks' together are no request, and passed over.
        capacity_bytes: what the device has for PyTorch to reserve; None: enough.
    """
    allocator = CachingAllocator(capacity_bytes)
    live: dict[int, Block] = {}
    block_bytes: dict[int, int] = {}
    after: list[tuple[int, int]] = []
    refusal = None
    for number, event in enumerate(trace.events):
        index = event.allocation
        if index is not None and trace.allocations[index].n_bytes and trace.allocations[index].blocks is None:
            if trace.allocations[index].born != number:
                allocator.free(live.pop(index))
            elif (block := allocator.allocate(trace.allocations[index].n_bytes, index)) is not None:
                live[index], block_bytes[index] = block, block.n_bytes
            else:
                refusal = _refusal(number, trace.allocations[index].n_bytes, allocator)
                break
        after.append((allocator.allocated_bytes, allocator.reserved_bytes))
    levels = np.array(after, np.int64).reshape(-1, 2)
    return Replay(
        allocated_bytes=levels[:, 0],
        reserved_bytes=levels[:, 1],
        flushes=allocator.flushes,
        refusal=refusal,
        actions=tuple(allocator.actions),
        segments=tuple(allocator.segments()),
        block_bytes=block_bytes,
    )


def _refusal(event: int, n_bytes: int, allocator: CachingAllocator) -> Refusal:
    size = rounded_size(n_bytes)
    return Refusal(event, size, segment_size(size), allocator.allocated_bytes, allocator.reserved_bytes)
