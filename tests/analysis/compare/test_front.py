"""The Pareto front, against brute force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bptool.analysis.compare.front import Point, dominated_by, dominates

SMALL = st.integers(0, 3)
COSTS = st.lists(st.tuples(SMALL, SMALL, SMALL), max_size=9)


@given(COSTS)
def test_where_every_difference_counts_it_is_the_usual_front(costs: list[tuple[int, int, int]]) -> None:
    def better(one: int, other: int) -> bool:
        return (
            one != other
            and costs[one] != costs[other]
            and all(a <= b for a, b in zip(costs[one], costs[other], strict=True))
        )

    rows = range(len(costs))
    front = {i for i in rows if not any(better(j, i) for j in rows)}
    points = [Point(n_bytes, error) for n_bytes, _, error in costs]
    found = dominated_by(points, lambda i, j: costs[i][1] < costs[j][1])
    assert found == [[] if i in front else [j for j in rows if j in front and better(j, i)] for i in rows]


@given(COSTS, st.integers(0, 2))
def test_where_small_differences_of_time_are_none_it_is_the_only_stable_set(
    costs: list[tuple[int, int, int]], least: int
) -> None:
    """Of all subsets, one: no member dominates another, and every other row is dominated by a member."""
    rows = range(len(costs))
    points = [Point(n_bytes, error) for n_bytes, _, error in costs]

    def faster(i: int, j: int) -> bool:
        return costs[i][1] < costs[j][1] - least

    above = {i: {j for j in rows if dominates(j, i, points, faster)} for i in rows}
    subsets = [{i for i in rows if bits >> i & 1} for bits in range(2 ** len(costs))]
    stable = [s for s in subsets if all(bool(above[i] & s) == (i not in s) for i in rows)]
    found = dominated_by(points, faster)
    assert stable == [{i for i in rows if not found[i]}]
    assert all(set(found[i]) == above[i] & stable[0] for i in rows if found[i])


def test_a_row_that_is_dominated_only_by_dominated_rows_is_on_the_front() -> None:
    """By hand: times 12, 10 and 8 of which only 12 and 8 differ; memory 1, 2 and 3."""
    times = [12, 10, 8]
    points = [Point(1, None), Point(2, None), Point(3, None)]
    assert dominated_by(points, lambda i, j: times[i] < times[j] - 3) == [[], [0], []]


def test_an_unknown_error_is_not_compared() -> None:
    points = [Point(1, None), Point(1, 0.5), Point(1, 0.1)]
    assert dominated_by(points, lambda i, j: False) == [[], [2], []]


def test_errors_that_differ_by_a_rounding_are_alike() -> None:
    """The first is faster than all; the second's error is 2% less and the third's 6%."""
    points = [Point(1, 1.0), Point(1, 0.98), Point(1, 0.94)]
    assert dominated_by(points, lambda i, j: i == 0 and j > 0) == [[], [0], []]


def test_like_rows_are_both_on_the_front() -> None:
    assert dominated_by([Point(1, 0.0), Point(1, 0.0)], lambda i, j: False) == [[], []]


def test_a_cycle_of_unknown_errors_still_has_an_answer() -> None:
    """0 beats 1 by time, 1 beats 2 by error, 2 beats 0 by time."""
    points = [Point(1, None), Point(1, 0.1), Point(1, 0.2)]
    found = dominated_by(points, lambda i, j: (i, j) in {(0, 1), (2, 0)})
    assert found == [[], [0], []] or any(not behind for behind in found)
    assert all(not found[j] for behind in found for j in behind)
