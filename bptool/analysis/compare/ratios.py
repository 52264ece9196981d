"""Is one row faster than another? The ratio of their times with its 95% interval.

Rows take turns, and a round holds each of them once, in a process of its own. Steps of one process share its luck
(where its memory lies, what else the machine did), so they are no independent samples of a row's time; rounds are.
What drifts from round to round hits both rows of a round alike. So each round gives one number, the logarithm of the
ratio of the two medians, and Student's interval for the mean of these numbers is the interval, as Kalibera and Jones
("Rigorous benchmarking in reasonable time", 2013) treat the highest level that is repeated; pairing takes the drift
out. That few rounds make a wide interval is the truth about few rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from scipy.stats import t as student

from bptool.analysis.compare.result import Ratio
from bptool.analysis.profile.statistics import CONFIDENCE, median_interval

Rounds = Mapping[int, Sequence[float]]
"""By round, seconds of each timed step over what it works off."""


def ratio(mine: Rounds, others: Rounds) -> Ratio | None:
    """My time over the other's; None where no round has both.

    Of a single round the interval is of the two medians over its steps: it knows nothing of what differs between one
    process and the next, and is too narrow by that.
    """
    both = sorted(mine.keys() & others.keys())
    if not both:
        return None
    logarithms = [math.log(statistics.median(mine[i]) / statistics.median(others[i])) for i in both]
    value = math.exp(statistics.fmean(logarithms))
    if len(both) == 1:
        top, bottom = median_interval(mine[both[0]]), median_interval(others[both[0]])
        low, high = top.low / bottom.high, top.high / bottom.low
    else:
        reach = float(student.ppf((1 + CONFIDENCE) / 2, len(both) - 1))
        margin = reach * statistics.stdev(logarithms) / math.sqrt(len(both))
        low, high = value * math.exp(-margin), value * math.exp(margin)
    return Ratio(value=value, low=low, high=high, significant=not low <= 1 <= high)


def counted_ratio(mine: float, others: float) -> Ratio:
    """Of two predictions, which have no spread."""
    value = mine / others
    return Ratio(value=value, low=None, high=None, significant=value != 1)
