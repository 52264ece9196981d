"""Records of allocations written by hand."""

from __future__ import annotations

from collections.abc import Sequence

from bptool.instruments.memory_trace import Allocation, Event, MemoryTrace


def record(moves: Sequence[int | Allocation]) -> MemoryTrace:
    """A record from its moves: so many bytes are allocated, and `~i` releases the i-th allocation.

    An `Allocation` is taken with its own names; when it is born and dies follows from the moves.
    """
    allocations: list[Allocation] = []
    events: list[Event] = []
    for move in moves:
        if isinstance(move, int) and move < 0:
            allocations[~move].died = len(events)
            events.append(Event(~move, -allocations[~move].n_bytes, 0, "", "", ""))
        else:
            made = Allocation(move, "temporaries", "", "", "", "", 0) if isinstance(move, int) else move
            made.born = len(events)
            events.append(Event(len(allocations), made.n_bytes, 0, "", made.module, made.op))
            allocations.append(made)
    return MemoryTrace(tuple(allocations), tuple(events))
