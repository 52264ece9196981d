"""Rows as points: which figures, in which unit of work, and the front's edge."""

from __future__ import annotations

import pytest
from comparisons import (
    comparison,
    large_comparison,
    measured_row,
    mixed_comparison,
    predicted_comparison,
    small_comparison,
)
from hypothesis import given
from hypothesis import strategies as st

from bptool.report.compare.points import Point, plane, staircase
from bptool.units import GIB, MIB


def test_rows_with_figures_are_points() -> None:
    result = mixed_comparison()
    shown = plane(result)
    assert [p.row for p in shown.points] == [0, 1, 2, 3]
    assert list(shown.left_out) == [4, 5, 6, 7, 8, 9, 10]
    for point in shown.points:
        row = result.rows[point.row]
        assert row.step_s is not None
        assert (point.n_bytes, point.seconds) == (row.measured_peak_bytes, row.step_s.median)
        assert (point.low, point.high) == (row.step_s.p10, row.step_s.p90)
        assert point.on_front == row.on_front
    assert (shown.memory, shown.time) == ("peak memory, measured", "time of a step, measured")


def test_predicted_figures_where_nothing_was_run() -> None:
    result = predicted_comparison()
    for point in plane(result).points:
        row = result.rows[point.row]
        assert (point.n_bytes, point.seconds) == (row.predicted_peak_bytes, row.predicted_step_s)
        assert point.low == point.seconds == point.high
    assert plane(result).memory == "peak memory, predicted"


def test_a_limit_stands_beside_what_it_is_asked_of() -> None:
    result = predicted_comparison({"fit_bytes": 270 * MIB})
    shown = plane(result)
    assert [p.n_bytes for p in shown.points] == [row.predicted_total_bytes for row in result.rows]
    assert (shown.memory, shown.limit_bytes) == ("memory needed, predicted", 270 * MIB)
    assert plane(small_comparison()).limit_bytes == 270 * MIB
    assert plane(small_comparison({"fit_bytes": 80 * GIB})).limit_bytes is None


def test_steps_that_are_not_alike_are_compared_by_token() -> None:
    """A step of 4 sequences is slower than one of 1, and better: 512 and 2,048 tokens of 0.12 s and 0.12 * 4**0.9 s."""
    result = comparison([measured_row("none", "fp32", 1), measured_row("none", "fp32", 4)])
    shown = plane(result)
    assert shown.time == "time of 1,000 tokens, measured"
    assert [p.seconds for p in shown.points] == pytest.approx([0.12 / 0.512, 0.12 * 4**0.9 / 2.048])
    assert shown.points[1].low == pytest.approx(0.97 * shown.points[1].seconds)


def test_one_row_is_best() -> None:
    assert [p.number for p in plane(small_comparison()).points if p.is_best] == ["6"]


@given(places=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), max_size=12))
def test_the_stairs_are_the_edge_of_the_front(places: list[tuple[int, int, bool]]) -> None:
    """Against the definition: those of the front that none of it beats in both, one of each place."""
    points = [Point(i, n, float(t), t, t, front, False) for i, (n, t, front) in enumerate(places)]
    front = {(p.seconds, p.n_bytes) for p in points if p.on_front}
    edge = {(t, n) for t, n in front if not any((a, b) != (t, n) and a <= t and b <= n for a, b in front)}
    stairs = [(p.seconds, p.n_bytes) for p in staircase(points)]
    assert stairs == sorted(edge)


def test_the_large_grid_has_a_front_beyond_the_stairs() -> None:
    shown = plane(large_comparison())
    assert 2 < len(staircase(shown.points)) < sum(p.on_front for p in shown.points)
