"""Medians, their spread, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bptool.analysis.profile.result import Duration

CONFIDENCE = 0.95
FEWEST = 6
"""Samples without which no interval between two of them holds the median with that confidence: 1 - 2 / 2^5 < 0.95."""


class Interval(NamedTuple):
    """From `low` to `high`, both included."""

    low: float
    high: float


def duration(seconds: Sequence[float]) -> Duration:
    """What a phase took; percentiles between two samples are interpolated."""
    p10, median, p90 = np.percentile(seconds, [10, 50, 90]).tolist()
    return Duration(median_s=median, p10_s=p10, p90_s=p90, samples_s=list(seconds))


def median_interval(values: Sequence[float]) -> Interval:
    """An interval that holds the median of what the samples were drawn from with a probability of 95% at least.

    It lies between two of the sorted samples, as many from either end as allowed: the number of samples below the
    median is binomial with p = 1/2, whatever their distribution (David & Nagaraja, Order Statistics, section 7.1).
    Samples must be independent. Of fewer than six it is the whole range, and surer than it has a right to be.
    """
    ordered = sorted(values)
    cut = _samples_to_leave_out(len(ordered))
    return Interval(ordered[cut], ordered[len(ordered) - 1 - cut])


def _samples_to_leave_out(count: int) -> int:
    """How many at either end: the most for which both tails together stay below 5%."""
    allowed = (1 - CONFIDENCE) / 2
    tail, left_out = 0.0, 0
    for below in range(count // 2):
        tail += math.comb(count, below) / 2**count
        if tail > allowed:
            break
        left_out = below
    return left_out
