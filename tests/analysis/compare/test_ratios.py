"""Intervals of ratios, against distributions that are known."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from bptool.analysis.compare.ratios import Rounds, counted_ratio, ratio


def drawn(generator: np.random.Generator, rounds: int, median: float, luck: float, drift: list[float]) -> Rounds:
    """Steps of a row: each round drifts alike for all rows, each process has its luck, each step its noise."""
    return {
        i: list(median * drift[i] * math.exp(generator.normal(0, luck)) * np.exp(generator.normal(0, 0.03, 9)))
        for i in range(rounds)
    }


@pytest.mark.parametrize("rounds", [2, 3, 6])
@pytest.mark.parametrize("true", [1.0, 1.3])
def test_the_interval_holds_the_truth_in_95_of_100_cases(rounds: int, true: float) -> None:
    generator, cases, held = np.random.default_rng(rounds), 2000, 0
    for _ in range(cases):
        drift = list(np.exp(generator.normal(0, 0.3, rounds)))
        found = ratio(drawn(generator, rounds, true, 0.04, drift), drawn(generator, rounds, 1.0, 0.04, drift))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= true <= found.high
        assert found.significant == (not found.low <= 1 <= found.high)
    low, high = stats.binom.interval(0.9999, cases, 0.95)
    assert low <= held <= high


def test_it_is_students_interval_of_the_rounds_logarithms() -> None:
    mine = {0: [2.0, 2.0, 9.0], 1: [2.2], 2: [1.9], 7: [100.0]}
    others = {0: [1.0], 1: [1.0, 1.0], 2: [1.0], 5: [0.1]}
    found = ratio(mine, others)
    sample = np.log([2.0, 2.2, 1.9])
    oracle = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
    assert found is not None
    assert found.value == pytest.approx(stats.gmean([2.0, 2.2, 1.9]))
    assert found.low == pytest.approx(math.exp(oracle.low))
    assert found.high == pytest.approx(math.exp(oracle.high))
    assert found.significant


def test_drift_that_hits_both_is_no_difference_and_no_noise() -> None:
    found = ratio({0: [1.1], 1: [2.2], 2: [4.4]}, {0: [1.0], 1: [2.0], 2: [4.0]})
    assert found is not None
    assert found.value == pytest.approx(1.1)
    assert found.low == pytest.approx(1.1)
    assert found.significant


@pytest.mark.parametrize(("shift", "significant"), [(1.0, False), (1.5, True)])
def test_one_round_is_judged_by_its_steps(shift: float, significant: bool) -> None:
    generator = np.random.default_rng(1)
    mine, others = (list(scale * np.exp(generator.normal(0, 0.05, 15))) for scale in (shift, 1.0))
    found = ratio({0: mine}, {0: others})
    assert found is not None
    assert found.value == pytest.approx(statistics.median(mine) / statistics.median(others))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found.significant == significant


def test_rows_without_a_common_round_are_not_compared() -> None:
    assert ratio({0: [1.0]}, {1: [1.0]}) is None


def test_what_was_counted_has_no_spread() -> None:
    assert counted_ratio(3.0, 2.0).model_dump() == {"value": 1.5, "low": None, "high": None, "significant": True}
    assert not counted_ratio(2.0, 2.0).significant
