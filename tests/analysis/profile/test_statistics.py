from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.analysis.profile.statistics import FEWEST, Interval, duration, median_interval


def test_percentiles_between_samples_are_interpolated() -> None:
    """Eleven samples 0, 1, ... 10 in any order: the tenth percentile is the second smallest."""
    result = duration([3, 0, 10, 4, 5, 1, 2, 9, 8, 7, 6])
    assert (result.p10_s, result.median_s, result.p90_s) == (1, 5, 9)
    assert result.samples_s == [3, 0, 10, 4, 5, 1, 2, 9, 8, 7, 6]
    two = duration([1.0, 2.0])
    assert (two.p10_s, two.median_s, two.p90_s) == pytest.approx((1.1, 1.5, 1.9))
    one = duration([4.0])
    assert (one.p10_s, one.median_s, one.p90_s) == (4, 4, 4)


def miss(count: int, left_out: int) -> float:
    """How often the median is outside: of all ways in which samples can lie above (1) or below (0) it, those with
    `left_out` or fewer on either side."""
    above = sum((np.arange(2**count) >> sample) & 1 for sample in range(count))
    return float(np.mean((above <= left_out) | (above >= count - left_out)))


class TestMedianInterval:
    @pytest.mark.parametrize(
        ("count", "left_out"),
        # The table of ranks for 95%: Conover, Practical Nonparametric Statistics, and any table of the sign test.
        [(6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3), (20, 5), (25, 7), (40, 13), (100, 39)],
    )
    def test_the_ranks_are_the_sign_tests(self, count: int, left_out: int) -> None:
        assert median_interval(range(count)) == Interval(left_out, count - 1 - left_out)

    @pytest.mark.parametrize("count", range(FEWEST, 19))
    def test_it_is_the_narrowest_that_is_sure_enough(self, count: int) -> None:
        left_out = int(median_interval(range(count)).low)
        assert miss(count, left_out) <= 0.05 < miss(count, left_out + 1)

    @pytest.mark.parametrize("count", [6, 7, 10, 21])
    @pytest.mark.parametrize("draw", ["lognormal", "standard_cauchy", "exponential"])
    def test_coverage_of_skewed_and_heavy_tails(self, count: int, draw: str) -> None:
        """Times are skewed. 2000 experiments: 95% less three standard errors of a proportion."""
        generator = np.random.default_rng(7)
        median = {"lognormal": 1.0, "standard_cauchy": 0.0, "exponential": np.log(2)}[draw]
        found = [median_interval(getattr(generator, draw)(size=count).tolist()) for _ in range(2000)]
        covered = np.mean([interval.low <= median <= interval.high for interval in found])
        assert covered >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 2000)

    def test_fewer_than_six_cannot_be_sure(self) -> None:
        assert miss(FEWEST, 0) < 0.05 < miss(FEWEST - 1, 0)
        assert median_interval([5.0, 1.0, 3.0]) == Interval(1, 5)
        assert median_interval([2.0]) == Interval(2, 2)

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
    def test_the_median_is_inside(self, values: list[float]) -> None:
        interval = median_interval(values)
        assert interval.low <= np.median(values) <= interval.high
