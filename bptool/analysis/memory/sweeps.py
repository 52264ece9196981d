"""A record cut into runs: stretches of events that belong to one block, or to none.

Runs of one block after another make a sweep through all of them, upwards (a forward, a loop over parameters) or
downwards (a backward).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from bptool.instruments.memory.trace import MemoryTrace

BLOCK = re.compile(r"blocks\.(\d+)(?=\.|$)")
"""A block's number at the beginning of a module's name."""


def block_of(module: str) -> int | None:
    """Number of the block that a module is in."""
    found = BLOCK.match(module)
    return int(found[1]) if found else None


def in_block(module: str, number: int) -> str:
    """The module of the same name in another block; what is in none keeps its name."""
    return BLOCK.sub(f"blocks.{number}", module, count=1)


class Run(NamedTuple):
    """Events of one block, or of none, and which part of the record they are; a sweep is one part."""

    part: int
    block: int | None
    events: range


def made_in(trace: MemoryTrace, run: Run) -> Iterator[int]:
    """The allocations that a run's events make, in order."""
    for number in run.events:
        allocation = trace.events[number].allocation
        if allocation is not None and trace.allocations[allocation].born == number:
            yield allocation


def parts(trace: MemoryTrace, depth: int) -> Iterator[list[Run]]:
    """The record's parts in order: sweeps, each of as many runs as there are blocks, and what lies between them."""
    stretches = list(_split_at_turns(trace, _stretches(trace)))
    at, number = 0, 0
    while at < len(stretches):
        label, events = stretches[at]
        if label.block is None:
            yield [Run(number, None, events)]
            at += 1
        else:
            runs, at = _sweep(trace, stretches, at, depth)
            yield [Run(number, block, run) for block, run in runs]
        number += 1


class _Label(NamedTuple):
    phase: str
    block: int | None


_Stretch = tuple[_Label, range]


def _stretches(trace: MemoryTrace) -> list[_Stretch]:
    """Successive events of the same phase (recomputation being part of the backward) and the same block or none.

    A loop releases the last round's tensor in the midst of this round: that belongs to what goes on around it.
    """
    stretches: list[_Stretch] = []
    for label, group in groupby(range(len(trace.events)), lambda number: _label(trace, number)):
        numbers = list(group)
        stretches.append((label, range(numbers[0], numbers[-1] + 1)))
        if len(stretches) > 2 and stretches[-3][0] == label:
            before, between = stretches[-3][1], stretches[-2][1]
            if _only_releases(trace, between) and (label.block is None or not _only_releases(trace, before)):
                stretches[-3:] = [(label, range(before.start, numbers[-1] + 1))]
    return stretches


def _split_at_turns(trace: MemoryTrace, stretches: Sequence[_Stretch]) -> Iterator[_Stretch]:
    """Where a list is made block by block and released from its end, two sweeps meet in one block: cut them apart."""
    for i, (label, numbers) in enumerate(stretches):
        cut = 0
        inner = 0 < i < len(stretches) - 1 and label.block is not None
        if inner and stretches[i - 1][0] == stretches[i + 1][0] != (label.phase, None):
            release = [_only_releases(trace, range(number, number + 1)) for number in numbers]
            # Upwards made and downwards released, or the other way round.
            cut = len(release) - _leading(release[::-1]) if not release[0] else _leading(release)
        yield from ((label, part) for part in (numbers[:cut], numbers[cut:]) if part)


def _leading(flags: Sequence[bool]) -> int:
    """How many are true before the first that is not."""
    return next((i for i, flag in enumerate(flags) if not flag), len(flags))


def _label(trace: MemoryTrace, number: int) -> _Label:
    event = trace.events[number]
    made = event.allocation is not None and trace.allocations[event.allocation].born == number
    module = trace.allocations[event.allocation].module if made and event.allocation is not None else event.module
    found = BLOCK.match(module)
    return _Label("backward" if event.phase == "recompute" else event.phase, int(found[1]) if found else None)


def _only_releases(trace: MemoryTrace, numbers: range) -> bool:
    events = (trace.events[number] for number in numbers)
    return all(event.allocation is not None and not event.op for event in events)


def _sweep(
    trace: MemoryTrace, stretches: Sequence[_Stretch], at: int, depth: int
) -> tuple[list[tuple[int, range]], int]:
    """The runs of the sweep that begins at a stretch, and where it ends; what follows a block's events is its own.

    A block may have none: where every k-th is recomputed, only those drop autocast's copies when a forward ends.
    """
    phase, block = stretches[at][0]
    direction = 1 if block == 0 else -1
    runs: list[tuple[int, range]] = []
    for expected in range(depth)[::direction]:
        label = _Label(phase, expected)
        if at == len(stretches) or stretches[at][0] != label:
            runs.append((expected, range(0)))
            continue
        start = at
        at += 1
        following = expected + direction if len(runs) < depth - 1 else None
        while _goes_on(trace, stretches, at, label, following):
            at += 1
        runs.append((expected, range(stretches[start][1].start, stretches[at - 1][1].stop)))
    return runs, at


def _goes_on(trace: MemoryTrace, stretches: Sequence[_Stretch], at: int, label: _Label, following: int | None) -> bool:
    """Whether a stretch is still a block's: its own, or of none where more of the block or the following one comes."""
    if at >= len(stretches) or stretches[at][0].phase != label.phase:
        return False
    if stretches[at][0] == label:
        return stretches[at - 1][0].block is None  # else the turn of two sweeps
    if stretches[at][0].block is not None or at + 1 == len(stretches):
        return False
    after, events = stretches[at + 1]
    if following is None:  # the last block: its releases are the next sweep's beginning
        return after == label and not _only_releases(trace, events)
    return after in (label, _Label(label.phase, following))
