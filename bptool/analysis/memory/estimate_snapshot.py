"""An estimate as a snapshot file that PyTorch's memory viewer opens, as if the step had run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bptool.analysis.memory.caching_allocator import Action, Replay, replay
from bptool.analysis.memory.caching_allocator import Block as AllocatorBlock
from bptool.instruments.memory.trace import Allocation, MemoryTrace
from bptool.interop.memory_snapshot import Block, Entry, Frame, Frames, Segment, Snapshot, write_snapshot_file


def write_snapshot(trace: MemoryTrace, path: Path, capacity_bytes: int | None = None) -> Replay:
    """Run a record through the allocator, and write what it did and what it ends with.

    Args:
        trace: the record; its allocations not rounded.
        path: is replaced if it exists.
        capacity_bytes: what the device has for PyTorch to reserve; None: enough.

    Raises:
        StorageError: the file cannot be written.
    """
    done = replay(trace, capacity_bytes)
    write_snapshot_file(path, snapshot_of(trace, done))
    return done


def snapshot_of(trace: MemoryTrace, done: Replay) -> Snapshot:
    """A record and its replay as PyTorch would have recorded them."""
    stacks = [_stack(allocation) for allocation in trace.allocations]
    reserved_by = {action.address: action.owner for action in done.actions if action.kind == "segment_alloc"}
    segments = [_segment(blocks, stacks, stacks[reserved_by[blocks[0].address]]) for blocks in done.segments]
    return Snapshot(0, tuple(segments), tuple(_entries(done.actions, stacks)))


def _stack(allocation: Allocation) -> Frames:
    """What the record knows, in the place of a stack: viewers show, filter and group by its lines."""
    known = {
        "tensor": allocation.tensor,
        "op": allocation.op,
        "module": allocation.module,
        "phase": allocation.phase,
        "category": allocation.category,
    }
    return tuple(Frame(kind, 0, name) for kind, name in known.items() if name)


def _segment(blocks: Sequence[AllocatorBlock], stacks: Sequence[Frames], frames: Frames) -> Segment:
    inside = tuple(
        Block(b.address, b.n_bytes, b.requested_bytes, b.owner is not None, () if b.owner is None else stacks[b.owner])
        for b in blocks
    )
    return Segment(blocks[0].address, blocks[0].pool.is_large, False, frames, inside)


def _entries(actions: Sequence[Action], stacks: Sequence[Frames]) -> Iterator[Entry]:
    for kind, address, n_bytes, owner in actions:
        # With one stream nothing comes between the request to free and the freeing.
        for name in ("free_requested", "free_completed") if kind == "free" else (kind,):
            yield Entry(name, address, n_bytes, stacks[owner])
