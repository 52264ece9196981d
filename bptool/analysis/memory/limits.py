"""How large a batch, how long a sequence: the most that fits, all else as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bptool.analysis.memory.alternatives import Changes, attempt
from bptool.analysis.question import Question


class Tried(NamedTuple):
    """What came of one size: whether it fits, and how many bytes it needs; None where that was plain without trying."""

    fits: bool
    needs: int | None


def largest_micro_batch(question: Question) -> int | None:
    """Most sequences of one micro-batch that fit; None where not even one does."""
    start = question.config.training.micro_batch_size
    return _largest_of(question, start, lambda size: {"training.micro_batch_size": size})


def longest_sequence(question: Question, multiple: int = 128) -> int | None:
    """Most tokens of a sequence that fit, a multiple of 128, the context growing with it; None where none do."""

    def changes(size: int) -> Changes:
        longer: Changes = {"training.sequence_length": size * multiple}
        if size * multiple > question.config.model.context_length:
            longer["model.context_length"] = size * multiple
        return longer

    start = max(question.config.training.sequence_length // multiple, 1)
    size = _largest_of(question, start, changes)
    return None if size is None else size * multiple


def largest(tried: Callable[[int], Tried], start: int, room: int) -> int | None:
    """The largest size from 1 on that fits, where every smaller one does; to a 64th of it where it is large.

    What a step needs grows nearly in a straight line with its batch, so the next size to try is where the line through
    two tries meets `room`. Every other try halves what is left in doubt, in case there is no such line.

    Args:
        tried: tries a size, which takes a second or more.
        start: the first size to try.
        room: bytes that there are.
    """
    low, high, step = 0, None, 1
    known: dict[int, int] = {}
    size = start
    while True:
        fits, needs = tried(size)
        if needs is not None:
            known[size] = needs
        if fits:
            low = size
        else:
            high = size
        if high is None:
            size, step = max(_on_the_line(known, room), low + step), 2 * step
        elif high - low <= max(1, low // 64):
            return low or None
        else:
            halfway, on_the_line = (low + high) // 2, _on_the_line(known, room)
            size = halfway if step % 2 == 0 else min(max(on_the_line, low + 1), high - 1)
            step += 1


def _on_the_line(known: dict[int, int], room: int) -> int:
    """Where the line through the two sizes whose needs are nearest to `room` (or nothing at size 0) meets it."""
    nearest = sorted(known, key=lambda size: abs(known[size] - room))[:2]
    if not nearest:
        return 0
    at = nearest[0]
    other, needs = (nearest[1], known[nearest[1]]) if len(nearest) > 1 else (0, 0)
    slope = (known[at] - needs) / (at - other)
    return at + int((room - known[at]) // slope) if slope > 0 else at


def _largest_of(question: Question, start: int, changes: Callable[[int], Changes]) -> int | None:
    machine = question.machine
    assert machine.capacity_bytes is not None, "asked of a capacity"
    room = machine.capacity_bytes - (machine.gpu.context.expected if machine.gpu else 0)

    def tried(size: int) -> Tried:
        step = attempt(question, changes(size), within=machine.capacity_bytes)
        return Tried(False, None) if step is None else Tried(bool(step.fits), step.reserved_bytes)

    return largest(tried, start, room)
