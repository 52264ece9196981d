"""The record of a loop from a few of its rounds, where all but the last do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

from bptool.instruments.memory.trace import Allocation, Event

_T = TypeVar("_T")


def abridged(
    rounds: Sequence[_T], allocations: list[Allocation], events: list[Event], tidy: Callable[[], None]
) -> Iterator[_T]:
    """The first two rounds and the last; what the second adds to the record is added for each in between as well.

    All the rounds, where the first two add different things or leave something behind.

    Args:
        allocations, events: the record, which the rounds add to.
        tidy: brings the record up to date.
    """
    if len(rounds) < 4:
        yield from rounds
        return
    edges = [len(events)]
    for one in rounds[:2]:
        yield one
        tidy()
        edges.append(len(events))
    first, second = (_part(allocations, events, *ends) for ends in pairwise(edges))
    if second is None or first != second:
        yield from rounds[2:-1]
    else:
        for _ in rounds[2:-1]:
            _append(second, allocations, events)
    yield rounds[-1]


class _Part(NamedTuple):
    """A part of a record by itself: times, and the numbers of allocations that are beside the events, begin at 0."""

    allocations: list[Allocation]
    events: list[tuple[int, Event]]


def _part(allocations: Sequence[Allocation], events: Sequence[Event], begin: int, end: int) -> _Part | None:
    """Events `begin` to `end`; None where one is a phase's edge, or of an allocation that lives before or after."""
    numbers = [event.allocation for event in events[begin:end] if event.allocation is not None]
    first = min(numbers, default=0)
    made = [_moved(allocations[number], -begin) for number in range(first, max(numbers, default=-1) + 1)]
    closed = all(a.born >= 0 and a.died is not None and a.died < end - begin for a in made)
    if not closed or len(numbers) < end - begin:
        return None
    ours = (event._replace(allocation=None) for event in events[begin:end])
    return _Part(made, [(number - first, event) for number, event in zip(numbers, ours, strict=True)])


def _append(part: _Part, allocations: list[Allocation], events: list[Event]) -> None:
    time, first = len(events), len(allocations)
    allocations.extend(_moved(a, time) for a in part.allocations)
    events.extend(event._replace(allocation=first + number) for number, event in part.events)


def _moved(allocation: Allocation, time: int) -> Allocation:
    died = None if allocation.died is None else allocation.died + time
    return replace(allocation, born=allocation.born + time, died=died)
