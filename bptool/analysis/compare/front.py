"""The Pareto front of memory, time and gradient error, where some differences are none.

A row dominates another if it is worse in none of the three and better in one. A time that may be shorter by chance is
not better, and one that may be longer by chance is not worse; nor is a gradient error that differs by less than a
twentieth, which another order of the same sums makes. That is not transitive: a may pass for as fast as b and b
for as fast as c, while a is slower than c. If a dominates b, and b c, but not a c, then c is not lost with b: what is
dominated by rows off the front only is on the front. So the rows on it do not dominate each other, and every other row
is dominated by one of them: the kernel of the relation (von Neumann and Morgenstern's stable set), of which a relation
without cycles has exactly one, and which is the usual front where all differences count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

_ALIKE = 1.05
"""Gradient errors of a smaller ratio are alike."""

Faster = Callable[[int, int], bool]
"""Whether the first row is taken to be faster than the second, by their indices."""


class Point(NamedTuple):
    """What a row costs besides time.

    Attributes:
        error: None: not known, and not compared with others'.
    """

    n_bytes: int
    error: float | None


def dominates(one: int, other: int, points: Sequence[Point], faster: Faster) -> bool:
    """Whether the one is worse in nothing, and better in something."""
    (my_bytes, my_error), (their_bytes, their_error) = points[one], points[other]
    if my_error is None or their_error is None:
        my_error = their_error = 0.0
    if my_bytes > their_bytes or my_error > _ALIKE * their_error or faster(other, one):
        return False
    return my_bytes < their_bytes or _ALIKE * my_error < their_error or faster(one, other)


def dominated_by(points: Sequence[Point], faster: Faster) -> list[list[int]]:
    """For each row, those on the front that dominate it: none for the rows on it."""
    rows = range(len(points))
    above = {i: {j for j in rows if j != i and dominates(j, i, points, faster)} for i in rows}
    front: set[int] = set()
    left = set(rows)
    while left:
        free = {i for i in left if not above[i] & left}
        # Unknown errors and rounds that are missing could close a cycle: then the first row of it is taken.
        front |= free or {min(left)}
        left = {i for i in left - front if not above[i] & front}
    return [sorted(above[i] & front) if i not in front else [] for i in rows]
