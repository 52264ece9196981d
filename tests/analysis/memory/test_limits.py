from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.analysis.memory.limits import Tried, largest

MIB = 2**20


class Step:
    """A step that needs `needs(size)` bytes; it counts how often it is tried."""

    def __init__(self, needs: Callable[[int], int], room: int) -> None:
        self.needs, self.room, self.tries = needs, room, 0

    def __call__(self, size: int) -> Tried:
        assert size >= 1
        self.tries += 1
        return Tried(self.needs(size) <= self.room, self.needs(size))

    def largest(self, start: int) -> int | None:
        return largest(self, start, self.room)


sizes = st.integers(1, 63)


@given(st.integers(0, 10**9), st.integers(1, 10**8), sizes, sizes)
def test_a_straight_line(fixed: int, each: int, most: int, start: int) -> None:
    """What fits is known: `room` is what `most` needs, or a little more."""
    step = Step(lambda size: fixed + each * size, fixed + each * most + each // 2)
    assert step.largest(start) == most


@given(st.lists(st.integers(0, 1000), min_size=64, max_size=64), st.integers(0, 70_000), sizes)
def test_whatever_grows(increments: list[int], room: int, start: int) -> None:
    """Also where steps are flat, or steep: the oracle is the whole list of needs."""
    needs = [sum(increments[: size + 1]) for size in range(64)]
    step = Step(lambda size: needs[size] if size < 64 else 10**9, room)
    assert step.largest(start) == (bisect_right(needs, room, lo=1) - 1 or None)


@pytest.mark.parametrize("start", [1, 64])
def test_few_tries(start: int) -> None:
    """A step of some gigabytes of state and 100 MiB a sequence, with room for 200; halving takes 15 tries."""
    step = Step(lambda size: 3000 * MIB + 100 * MIB * size, 23_000 * MIB)
    found = step.largest(start)
    assert found is not None
    assert 197 <= found <= 200
    assert step.tries <= 7


def test_a_square() -> None:
    """Written-out attention's scores."""
    step = Step(lambda size: 1000 + size**2, 1000 + 50**2)
    assert step.largest(4) == 50


def test_nothing_fits() -> None:
    assert Step(lambda size: 100 + size, 50).largest(7) is None


def test_where_the_needs_are_not_known_of_what_is_too_large() -> None:
    found = largest(lambda size: Tried(size <= 21, size if size <= 21 else None), 60, 21)
    assert found == 21
