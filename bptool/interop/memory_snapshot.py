"""PyTorch's memory snapshots: what `torch.cuda.memory._dump_snapshot` writes and https://pytorch.org/memory_viz shows.

A pickle of plain containers. `segments` is what the allocator has reserved when the snapshot is taken, with the blocks
in it; `device_traces` is, for each device, what it did before, oldest first, as far back as it was told to remember.
Described in torch/cuda/memory.py (`_snapshot`); what readers rely on shows in torch/cuda/_memory_viz.py and in
torch/utils/viz/MemoryViz.js. A pickle can run code when it is loaded: one that names any class or function is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bptool.errors import DataError, StorageError, nearest
from bptool.files import replacing

_PROTOCOL = 4  # the newest that the viewer reads
_REMEDY = (
    "record one with torch.cuda.memory._record_memory_history() before the step and "
    "torch.cuda.memory._dump_snapshot('snapshot.pickle') after it"
)
_SETTINGS: dict[str, Any] = {
    "PYTORCH_CUDA_ALLOC_CONF": "",
    "max_split_size": -1,
    "garbage_collection_threshold": 0.0,
    "expandable_segments": False,
    "pinned_num_register_threads": 1,
    "release_lock_on_cudamalloc": False,
    "pinned_use_cuda_host_register": False,
    "roundup_power2_divisions": {},
}
T = TypeVar("T")


class Frame(NamedTuple):
    """One line of a stack; `line` is 0 where it is unknown."""

    filename: str
    line: int
    name: str


Frames = tuple[Frame, ...]
"""A stack, innermost frame first; empty where none was recorded."""


class Block(NamedTuple):
    """A part of a segment.

    Attributes:
        address: of its first byte.
        n_bytes: its length.
        requested_bytes: of that, what was asked for.
        allocated: whether somebody holds it; not so when it is free, or waits for another stream to be done with it.
        frames: where it was asked for.
    """

    address: int
    n_bytes: int
    requested_bytes: int
    allocated: bool
    frames: Frames


class Segment(NamedTuple):
    """Memory reserved in one piece, and all the blocks in it by address."""

    address: int
    is_large: bool
    is_expandable: bool
    frames: Frames
    blocks: tuple[Block, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all its blocks."""
        return sum(block.n_bytes for block in self.blocks)


class Entry(NamedTuple):
    """One thing that the allocator did.

    Attributes:
        action: `alloc`, `free_requested`, `free_completed`, `segment_alloc`, `segment_free`, `segment_map`,
            `segment_unmap`, `oom`, `snapshot` or a word of a later version.
        address: of the block or segment; of an `oom`, the bytes that the device has left.
        n_bytes: as requested; of a segment, its length.
        frames: who asked for it.
    """

    action: str
    address: int
    n_bytes: int
    frames: Frames


class Snapshot(NamedTuple):
    """One device's memory: what is reserved, and how it came about.

    Attributes:
        device: its number; of several, the one with the most reserved.
        segments: when the snapshot was taken.
        history: before that, oldest first; empty where none was recorded.
    """

    device: int
    segments: tuple[Segment, ...]
    history: tuple[Entry, ...]


def write_snapshot_file(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot; `path` is whole, or what it was.

    Raises:
        StorageError: it cannot be written.
    """
    stacks = _Stacks()
    traces: list[list[dict[str, Any]]] = [[] for _ in range(snapshot.device + 1)]
    traces[snapshot.device] = [_entry_dict(number, entry, stacks) for number, entry in enumerate(snapshot.history)]
    document = {
        "segments": [_segment_dict(snapshot.device, segment, stacks) for segment in snapshot.segments],
        "device_traces": traces,
        "allocator_settings": _SETTINGS,
        "external_annotations": [],
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        pickle.dump(document, file, protocol=_PROTOCOL)


class _Stacks(dict[Frames, list[dict[str, Any]]]):
    """Equal stacks are one object, so that each lies in the file once."""

    def __missing__(self, frames: Frames) -> list[dict[str, Any]]:
        self[frames] = [frame._asdict() for frame in frames]
        return self[frames]


def _entry_dict(number: int, entry: Entry, stacks: _Stacks) -> dict[str, Any]:
    # No key `category`: the viewer takes it for a list of categories of its own, and stumbles.
    return {
        "action": entry.action,
        "device_free" if entry.action == "oom" else "addr": entry.address,
        "size": entry.n_bytes,
        "stream": 0,
        "time_us": number,
        "frames": stacks[entry.frames],
    }


def _segment_dict(device: int, segment: Segment, stacks: _Stacks) -> dict[str, Any]:
    allocated = [block for block in segment.blocks if block.allocated]
    allocated_bytes = sum(block.n_bytes for block in allocated)
    return {
        "device": device,
        "address": segment.address,
        "total_size": segment.n_bytes,
        "allocated_size": allocated_bytes,
        "active_size": allocated_bytes,
        "requested_size": sum(block.requested_bytes for block in allocated),
        "stream": 0,
        "segment_type": "large" if segment.is_large else "small",
        "segment_pool_id": (0, 0),
        "is_expandable": segment.is_expandable,
        "frames": stacks[segment.frames],
        "blocks": [_block_dict(block, stacks) for block in segment.blocks],
    }


def _block_dict(block: Block, stacks: _Stacks) -> dict[str, Any]:
    return {
        "address": block.address,
        "size": block.n_bytes,
        "requested_size": block.requested_bytes,
        "state": "active_allocated" if block.allocated else "inactive",
        "frames": stacks[block.frames],
    }


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot; nothing in the file is executed.

    Raises:
        DataError: missing, or not a snapshot.
        StorageError: it cannot be read.
    """
    document = _load(path)
    if isinstance(document, list):  # the segments alone, as `torch.cuda.memory_snapshot()` returns them
        document = {"segments": document, "device_traces": []}
    try:
        return _Reading().snapshot(document)
    except _NotSoError as error:
        raise DataError(f"'{path}' is not a memory snapshot: {error}", _REMEDY) from None


class _PlainUnpickler(pickle.Unpickler):
    """Loads numbers, texts and containers; whatever would be looked up by name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except FileNotFoundError:
        siblings = (entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else ()
        raise DataError(f"snapshot '{path}' does not exist{nearest(path.name, siblings)}", _REMEDY) from None
    except OSError as error:
        raise StorageError(f"snapshot '{path}' cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle fails in any way
        problem = str(error) or type(error).__name__ if path.stat().st_size else "it is empty (0 bytes)"
        raise DataError(f"'{path}' is not a memory snapshot: {problem}", _REMEDY) from None


class _NotSoError(Exception):
    """A document that is no snapshot; the message names the place."""


class _Reading:
    """From the document's containers to records; a stack that many entries share is read once."""

    def __init__(self) -> None:
        self._stacks: dict[int, Frames] = {}

    def snapshot(self, document: Any) -> Snapshot:
        segments = [
            (_value(segment, "device", int, where, 0), self._segment(segment, where))
            for where, segment in _items(document, "segments", "the file")
        ]
        histories = [
            tuple(self._entry(entry, place) for place, entry in _numbered(trace, where))
            for where, trace in _items(document, "device_traces", "the file")
        ]
        reserved = dict.fromkeys(range(len(histories)), 0)
        for device, segment in segments:
            reserved[device] = reserved.get(device, 0) + segment.n_bytes
        chosen = max(reserved, key=lambda d: (reserved[d], len(histories[d]) if d < len(histories) else 0), default=0)
        history = histories[chosen] if chosen < len(histories) else ()
        return Snapshot(chosen, tuple(segment for device, segment in segments if device == chosen), history)

    def _segment(self, segment: Any, where: str) -> Segment:
        address = _value(segment, "address", int, where)
        blocks: list[Block] = []
        next_address = address
        for place, block in _items(segment, "blocks", where):
            blocks.append(self._block(block, next_address, place))
            next_address += blocks[-1].n_bytes
        is_large = _value(segment, "segment_type", str, where, "large") == "large"
        is_expandable = _value(segment, "is_expandable", bool, where, False)
        return Segment(address, is_large, is_expandable, self._frames(segment, where), tuple(blocks))

    def _block(self, block: Any, address: int, where: str) -> Block:
        """Blocks lie end to end; files of older versions leave out their addresses."""
        size = _value(block, "size", int, where)
        requested = _value(block, "requested_size", int, where, size)
        allocated = _value(block, "state", str, where) == "active_allocated"
        return Block(address, size, requested if allocated else 0, allocated, self._frames(block, where))

    def _entry(self, entry: Any, where: str) -> Entry:
        action = _value(entry, "action", str, where)
        address = _value(entry, "device_free" if action == "oom" else "addr", int, where, 0)
        return Entry(action, address, _value(entry, "size", int, where, 0), self._frames(entry, where))

    def _frames(self, holder: Any, where: str) -> Frames:
        stack = _value(holder, "frames", list, where, [])
        frames = self._stacks.get(id(stack)) if stack else ()
        if frames is None:
            frames = tuple(
                Frame(_value(f, "filename", str, p), _value(f, "line", int, p), _value(f, "name", str, p))
                for p, f in _numbered(stack, f"{where}.frames")
            )
            self._stacks[id(stack)] = frames
        return frames


def _items(holder: Any, key: str, where: str) -> Iterable[tuple[str, Any]]:
    return _numbered(_value(holder, key, list, where), f"{where}.{key}" if where != "the file" else key)


def _numbered(items: Any, where: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(items, list):
        raise _NotSoError(f"{where} is a {type(items).__name__}, not a list")
    return ((f"{where}[{i}]", item) for i, item in enumerate(items))


_REQUIRED: Any = object()


def _value(holder: Any, key: str, kind: type[T], where: str, default: T = _REQUIRED) -> T:
    if not isinstance(holder, dict):
        raise _NotSoError(f"{where} is a {type(holder).__name__}, not a dict")
    value = holder.get(key, default)
    if value is _REQUIRED:
        raise _NotSoError(f"{where} has no '{key}'")
    if not isinstance(value, kind):
        raise _NotSoError(f"{where} has '{key}' of type {type(value).__name__}, not {kind.__name__}")
    return value
