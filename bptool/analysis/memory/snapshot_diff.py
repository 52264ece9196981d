"""An estimate beside a snapshot of the real thing: the peaks, and which blocks only one of them has.

A tensor has no name in a snapshot, so blocks are matched by their size alone: so many of a size here, so many there.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch

from bptool.analysis.memory.caching_allocator import replay, rounded_size
from bptool.analysis.memory.snapshot_peak import LiveBlock, peak_of
from bptool.analysis.result import Record
from bptool.instruments.memory.trace import Allocation, MemoryTrace
from bptool.interop.memory_snapshot import Frame, Snapshot

_TORCH = Path(torch.__file__).parent
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_OPERATOR = re.compile(r"^at::_ops::(\w+)::")


class Source(Record):
    """Where blocks of one size come from, and how many come from there."""

    where: str
    blocks_count: int


class SizeDifference(Record):
    """Blocks of one size, of which one side has more.

    Attributes:
        size_bytes: as asked for, rounded up to 512.
        estimate: where the estimate's come from (category, module, operation), most frequent first.
        snapshot: where the snapshot's come from: the innermost line that is not PyTorch's own.
    """

    size_bytes: int
    estimate_count: int
    snapshot_count: int
    estimate: tuple[Source, ...]
    snapshot: tuple[Source, ...]

    @property
    def excess_bytes(self) -> int:
        """Bytes that the estimate has more; negative where the snapshot has."""
        return (self.estimate_count - self.snapshot_count) * self.size_bytes


class Side(Record):
    """One of the two, when most was allocated.

    Attributes:
        allocated_bytes: in blocks, as `torch.cuda.max_memory_allocated`.
        unsplit_bytes: of these, what the allocator gave beyond the rounded size, as too little to be a block.
        reserved_bytes: the most at any moment, as `torch.cuda.max_memory_reserved`.
    """

    allocated_bytes: int
    unsplit_bytes: int
    reserved_bytes: int
    blocks_count: int


class SnapshotDiff(Record):
    """An estimate and a snapshot at their peaks.

    Attributes:
        has_history: whether the snapshot tells what was before; if not, its peak is the moment when it was taken.
        has_expandable_segments: whether the snapshot's allocator has; the estimate's has not, and reserves otherwise.
        matched_count: blocks that both have.
        differences: sizes of which they have different numbers, most bytes first.
    """

    estimate: Side
    snapshot: Side
    has_history: bool
    has_expandable_segments: bool
    matched_count: int
    matched_bytes: int
    differences: tuple[SizeDifference, ...]


def diff(trace: MemoryTrace, event: int, snapshot: Snapshot) -> SnapshotDiff:
    """Compare what a record holds after an event with what a snapshot's device held at its peak.

    Args:
        trace: the record; its allocations not rounded.
        event: the record's peak, or any moment that is to be compared.
        snapshot: as `read_snapshot` returns it.
    """
    done, peak = replay(trace), peak_of(snapshot)
    ours = _by_size((rounded_size(a.n_bytes), _estimate_source(a)) for a in trace.live_at(event) if a.n_bytes)
    theirs = _by_size((rounded_size(block.requested_bytes), _snapshot_source(block)) for block in peak.blocks)
    counts = {size: (ours[size].total(), theirs[size].total()) for size in ours.keys() | theirs.keys()}
    differences = [_difference(size, ours[size], theirs[size]) for size, (a, b) in counts.items() if a != b]
    return SnapshotDiff(
        estimate=_side(int(done.allocated_bytes[event]), done.peak_reserved_bytes, ours),
        snapshot=_side(peak.allocated_bytes, peak.reserved_bytes, theirs),
        has_history=bool(snapshot.history),
        has_expandable_segments=any(segment.is_expandable for segment in snapshot.segments),
        matched_count=sum(min(both) for both in counts.values()),
        matched_bytes=sum(size * min(both) for size, both in counts.items()),
        differences=tuple(sorted(differences, key=lambda d: (-abs(d.excess_bytes), -d.size_bytes))),
    )


def _by_size(blocks: Iterable[tuple[int, str]]) -> defaultdict[int, Counter[str]]:
    """For each size how many blocks come from where."""
    sources: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for size, source in blocks:
        sources[size][source] += 1
    return sources


def _side(allocated_bytes: int, reserved_bytes: int, blocks: Mapping[int, Counter[str]]) -> Side:
    rounded_bytes = sum(size * sources.total() for size, sources in blocks.items())
    return Side(
        allocated_bytes=allocated_bytes,
        unsplit_bytes=allocated_bytes - rounded_bytes,
        reserved_bytes=reserved_bytes,
        blocks_count=sum(sources.total() for sources in blocks.values()),
    )


def _difference(size: int, ours: Counter[str], theirs: Counter[str]) -> SizeDifference:
    return SizeDifference(
        size_bytes=size,
        estimate_count=ours.total(),
        snapshot_count=theirs.total(),
        estimate=tuple(Source(where=where, blocks_count=n) for where, n in ours.most_common()),
        snapshot=tuple(Source(where=where, blocks_count=n) for where, n in theirs.most_common()),
    )


def _estimate_source(allocation: Allocation) -> str:
    """`activations: blocks.*.feed_forward.up aten.mm`: layers are alike, so their numbers are left out."""
    module = _LAYER_NUMBER.sub("*", allocation.module)
    return f"{allocation.category}: {' '.join(filter(None, (module, allocation.op)))}".rstrip(": ")


def _snapshot_source(block: LiveBlock) -> str:
    """`model/attention.py:39 forward`; failing that, as where autograd runs without Python, the operation."""
    if not block.frames:
        return "no stack recorded"
    if users := [frame for frame in block.frames if _is_the_users(frame.filename)]:
        return _line(users[0])
    operators = (found[1] for frame in block.frames if (found := _OPERATOR.match(frame.name)))
    return next((f"aten.{operator}" for operator in operators), _line(block.frames[0]))


def _line(frame: Frame) -> str:
    return f"{'/'.join(_parts(frame.filename)[-2:])}:{frame.line} {frame.name}"


@cache
def _is_the_users(filename: str) -> bool:
    """Python, and neither PyTorch's own (whichever installation it was) nor the interpreter's."""
    if not filename.endswith(".py"):
        return filename.startswith(("<ipython", "<stdin", "<string"))
    parts = _parts(filename)
    if "torch" not in parts:
        return True
    last = len(parts) - 1 - parts[::-1].index("torch")
    return not _TORCH.joinpath(*parts[last + 1 :]).exists()


def _parts(filename: str) -> list[str]:
    return [part for part in filename.replace("\\", "/").split("/") if part]
