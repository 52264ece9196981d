"""What was held when: the record that a memory ledger makes, and that every view of memory is computed from.

Time is counted in events: an allocation, a release, or a phase that begins or ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

Category = Literal["parameters", "gradients", "optimizer_state", "activations", "temporaries", "inputs"]
"""`parameters` has the buffers too; `activations` is what a forward leaves behind, for the backward or otherwise."""

CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(slots=True)
class Allocation:
    """One storage, from its allocation to its release.

    Attributes:
        n_bytes: as asked for; an allocator may round it up.
        module: dotted name of the innermost module at work (in the backward, of the one whose forward recorded the
            operation; of a parameter, its owner); empty outside of all.
        op: the operation that made it, such as `aten.mm`; empty where none did.
        tensor: dtype and shape of the first tensor on it, such as `float32[8, 1024]`.
        phase: the innermost phase that made it; empty outside of all.
        born: the event that allocates it.
        died: the event that releases it; None where it outlives the record.
        blocks: where it stands for one storage each of many like blocks: their numbers. Its size is that of all
            together, and its module is in the first of them.
    """

    n_bytes: int
    category: Category
    module: str
    op: str
    tensor: str
    phase: str
    born: int
    died: int | None = None
    blocks: range | None = None

    @property
    def count(self) -> int:
        """How many storages it stands for."""
        return 1 if self.blocks is None else len(self.blocks)


class Event(NamedTuple):
    """One moment of the record.

    Attributes:
        allocation: index of the allocation that it makes or releases; None where a phase begins or ends.
        delta: bytes that it adds; negative for a release, 0 for the edge of a phase.
        step: number of the step that it is in; -1 before the first.
        phase: innermost phase after it; empty outside of all.
        module: where it happens, as in `Allocation`.
        op: the operation that allocates; empty for a release.
    """

    allocation: int | None
    delta: int
    step: int
    phase: str
    module: str
    op: str


@dataclass(frozen=True)
class MemoryTrace:
    """A finished record: every allocation, and the events in order."""

    allocations: Sequence[Allocation]
    events: Sequence[Event]

    @cached_property
    def live_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes held after each event."""
        deltas = np.fromiter((event.delta for event in self.events), np.int64, len(self.events))
        return np.cumsum(deltas)

    @cached_property
    def _step_numbers(self) -> npt.NDArray[np.int64]:
        return np.fromiter((event.step for event in self.events), np.int64, len(self.events))

    def events_of(self, step: int, phase: str | None = None) -> npt.NDArray[np.int64]:
        """Indices of a step's events, of all phases or of one (innermost)."""
        indices = np.flatnonzero(self._step_numbers == step)
        if phase is None:
            return indices
        return np.array([i for i in indices.tolist() if self.events[i].phase == phase], dtype=np.int64)

    def peak_event(self, step: int, phase: str | None = None) -> int:
        """The first event after which most bytes are held, of a step or of one of its phases."""
        indices = self.events_of(step, phase)
        return int(indices[self.live_bytes[indices].argmax()])

    def phases_of(self, step: int) -> list[str]:
        """The step's phases, in the order in which they begin."""
        return [phase for phase in dict.fromkeys(self.events[i].phase for i in self.events_of(step).tolist()) if phase]

    def live_at(self, event: int) -> list[Allocation]:
        """What is held after an event."""
        return [a for a in self.allocations if a.born <= event and (a.died is None or a.died > event)]

    @cached_property
    def category_bytes(self) -> dict[Category, npt.NDArray[np.int64]]:
        """For each category, the bytes held after each event; together they are `live_bytes`."""
        deltas = {category: np.zeros(len(self.events), np.int64) for category in CATEGORIES}
        for allocation in self.allocations:
            deltas[allocation.category][allocation.born] += allocation.n_bytes
            if allocation.died is not None:
                deltas[allocation.category][allocation.died] -= allocation.n_bytes
        return {category: np.cumsum(changes) for category, changes in deltas.items()}

    def rounded(self, multiple: int) -> MemoryTrace:
        """The same, with each storage rounded up to a multiple of so many bytes."""

        def size_of(index: int) -> int:
            count = self.allocations[index].count
            return -(-self.allocations[index].n_bytes // (count * multiple)) * multiple * count

        return self.resized(size_of)

    def resized(self, size_of: Callable[[int], int]) -> MemoryTrace:
        """The same, with other sizes, by the allocations' indices."""
        # Not by `dataclasses.replace`, which takes three times as long.
        allocations = [
            Allocation(size_of(index), a.category, a.module, a.op, a.tensor, a.phase, a.born, a.died, a.blocks)
            for index, a in enumerate(self.allocations)
        ]
        events = []
        for number, event in enumerate(self.events):
            index, _, step, phase, module, op = event
            if index is not None:
                resized = allocations[index]
                delta = resized.n_bytes if resized.born == number else -resized.n_bytes
                event = Event(index, delta, step, phase, module, op)
            events.append(event)
        return MemoryTrace(allocations, events)


def total_bytes(allocations: Iterable[Allocation]) -> int:
    """Their sum."""
    return sum(a.n_bytes for a in allocations)
