"""Both steps in full, for the allocator: what the first one leaves reserved decides where the second finds room.

A simulation runs the first step's optimizer alone. The rest of that step is the second's forward and backward, which
are known, so its events are copied from there.
"""

from __future__ import annotations

from collections.abc import Iterable

from bptool.analysis.memory.simulation import FIRST, STEADY
from bptool.instruments.memory.trace import Allocation, Event, MemoryTrace


def with_whole_first_step(trace: MemoryTrace) -> MemoryTrace:
    """A simulated record with the first step's forward and backward in it.

    The allocations keep their indices, and copies follow; the gradients of zero that stood in for the first step's are
    in no event any more.
    """
    first, second = (trace.events_of(step).tolist() for step in (FIRST, STEADY))
    update = [number for number in second if trace.events[number].phase == "optimizer"]
    writer = _Writer(trace)
    writer.keep(range(first[0]))
    writer.copy(number for number in second if number < update[0])
    writer.keep(number for number in first if not _is_of_gradient(trace, number))
    writer.release_copies(update)
    writer.copy(number for number in second if number > update[-1])
    writer.keep(second)
    return MemoryTrace(writer.allocations, writer.events)


def _is_of_gradient(trace: MemoryTrace, number: int) -> bool:
    """Whether an event makes or releases one of the gradients that the first step begins with."""
    index = trace.events[number].allocation
    return index is not None and trace.allocations[index].phase == "backward"


class _Writer:
    """Writes events into a new record, as they were or for copies of their allocations."""

    def __init__(self, trace: MemoryTrace) -> None:
        self.allocations = [_unborn(a) for a in trace.allocations]
        self.events: list[Event] = []
        self._trace = trace
        self._copies: dict[int, int] = {}  # an allocation's living copy

    def keep(self, numbers: Iterable[int]) -> None:
        """Events as they were. What outlived the copied step goes when its successor is there."""
        for number in numbers:
            index = self._trace.events[number].allocation
            if index is None or not self._is_birth(index, number):
                self._write(number, index, dies=True)
            else:
                self._write(number, index)
                self._release_copy(index, number)

    def copy(self, numbers: Iterable[int]) -> None:
        """Events for copies; what was made before is left alone."""
        for number in numbers:
            index = self._trace.events[number].allocation
            if index is None:
                self._write(number, None)
            elif self._is_birth(index, number):
                self._copies[index] = len(self.allocations)
                self.allocations.append(_unborn(self._trace.allocations[index]))
                self._write(number, self._copies[index])
            else:
                self._release_copy(index, number)

    def release_copies(self, numbers: Iterable[int]) -> None:
        """Of these events only those that release copies."""
        for number in numbers:
            self._release_copy(self._trace.events[number].allocation, number)

    def _release_copy(self, index: int | None, number: int) -> None:
        if index in self._copies:
            self._write(number, self._copies.pop(index), dies=True)

    def _write(self, number: int, index: int | None, *, dies: bool = False) -> None:
        event, delta = self._trace.events[number], 0
        if index is not None:
            allocation, now = self.allocations[index], len(self.events)
            delta = -allocation.n_bytes if dies else allocation.n_bytes
            allocation.born, allocation.died = (allocation.born, now) if dies else (now, None)
        self.events.append(Event(index, delta, *event[2:]))

    def _is_birth(self, index: int, number: int) -> bool:
        return self._trace.allocations[index].born == number


def _unborn(a: Allocation) -> Allocation:
    """A copy that no event makes yet (`dataclasses.replace` takes three times as long)."""
    return Allocation(a.n_bytes, a.category, a.module, a.op, a.tensor, a.phase, -1, blocks=a.blocks)
