"""Records of allocations: written by hand, and of any kind."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from bptool.instruments.memory.trace import Allocation, Event, MemoryTrace
from bptool.units import MIB


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


SIZES = st.one_of(
    st.integers(1, 4096),
    st.integers(1, 2 * MIB),
    st.integers(1, 30 * MIB),
    st.builds(
        lambda half_mib, off: half_mib * MIB // 2 + off, st.integers(1, 60), st.sampled_from([-512, -1, 0, 1, 512])
    ),
)


@st.composite
def records(draw: st.DrawFn, sizes: st.SearchStrategy[int] = SIZES) -> MemoryTrace:
    """Requests of all kinds and releases in any order."""
    moves: list[int] = []
    live: list[int] = []
    made = 0
    for size in draw(st.lists(st.none() | sizes, max_size=60)):
        if size is None and live:
            moves.append(~live.pop(draw(st.integers(0, len(live) - 1))))
        elif size is not None:
            moves.append(size)
            live.append(made)
            made += 1
    return record(moves)


CAPACITIES = st.none() | st.integers(1, 120).map(lambda n: n * MIB)
