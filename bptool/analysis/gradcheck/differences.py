"""A slope by central differences, extrapolated to step 0, with an error bar of its own.

For a direction v let T(h) = (f(h v) - f(-h v)) / 2h. Its error is a series in h^2, so that a Neville table over falling
steps removes the leading terms (Richardson 1911; Ridders 1982, "Accurate computation of F'(x) and F'(x)F''(x)"). An
entry's truncation error is bounded by twice its distance from the better of the two entries that it is made of; its
rounding error by the noise of f over the smallest step that it uses. The entry with the smallest sum is taken.

Left and right slopes are compared as well: S(h) = (f(h v) - 2 f(0) + f(-h v)) / h is h f'' where f is smooth, and stays
where there is a kink at 0, with the jump of the slope as its limit. Half of that limit belongs to the error bar.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bptool.analysis.gradcheck.subject import Subject

Along = Callable[[float], float]
"""f at a step along a direction."""

RATIO = 8.0
"""Each step is so much smaller than the one before."""
FIRST_STEPS = (2.0**-7, 2.0**-10, 2.0**-13)
SMALLEST_STEP, LARGEST_STEP = 2.0**-31, 2.0**-1
ROUNDING = 8.0
"""So many standard deviations of f's noise, over the step, bound a difference's rounding error."""
EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Noise:
    """How exact the values of f are.

    Attributes:
        sigma: standard deviation of f's rounding error.
        epsilon: the relative precision of the coarsest number format on the way: float64's, unless f uses less.
    """

    sigma: float
    epsilon: float = EPSILON


@dataclass(frozen=True)
class Slope:
    """A directional derivative.

    Attributes:
        value: the derivative, or NaN where f is not finite at any step.
        error_bar: bounds its error.
        jump: right slope minus left slope, where they differ at every step; 0: f is smooth as far as can be seen.
    """

    value: float
    error_bar: float
    jump: float = 0.0


def slope(
    along: Along, center: float, noise: Noise, *, goal: float = 0.0, offset: float = 1.0, n_steps: int = 3
) -> Slope:
    """f's slope at 0.

    Args:
        center: f(0).
        goal: an error bar that is small enough; smaller or larger steps are tried until it is met, or no longer helps.
        offset: multiplies the first steps, so that a second look has other ones.
        n_steps: how many first steps, two evaluations each; at least 2.
    """
    table = _Table(along, center, noise)
    for step in _first_steps(noise, offset)[-n_steps:]:
        table.add(step)
    while table.best().error_bar > goal and (further := table.next_step()):
        table.add(further)
    best = table.best()
    kink = best.error_bar > goal and table.is_kinked()
    return Slope(best.value, best.error_bar, best.jump if kink else 0.0)


def estimate_noise(subject: Subject, direction: Mapping[str, Tensor], epsilon: float) -> Noise:
    """The noise of f by differences of its values at equal, tiny steps (Moré and Wild 2011, "Estimating computational
    noise"): a fourth difference of a smooth f is all noise, with 70 times its variance.

    Where f computes in a lower precision, its staircase is too coarse to be seen so; epsilon tells.
    """
    with subject.values_along(direction) as value_at:
        values = [value_at(2.0**-24 * k) for k in range(1, 11)]
    scale = max(map(abs, values))
    fourth = torch.tensor(values, dtype=torch.float64)
    for _ in range(4):
        fourth = fourth.diff()
    seen = statistics.median(fourth.abs().tolist()) / math.sqrt(70) / 0.67  # median of |normal| over its deviation
    return Noise(max(2 * seen, epsilon * max(scale, _terms(subject))), epsilon)


def _terms(subject: Subject) -> float:
    """Root of the sum of squares of L's terms: each is rounded, also where they cancel."""
    with torch.no_grad():
        outputs = subject.outputs()
        weights = subject.output_weights()
        squares = [
            (o.abs() * w.abs()).square().sum().item() for o, w in zip(outputs, weights, strict=True) if w is not None
        ]
    return math.sqrt(sum(squares))


def _first_steps(noise: Noise, offset: float) -> tuple[float, ...]:
    if noise.epsilon > EPSILON:  # steps must be seen through the rounding: about epsilon^(1/3), and its neighbours
        middle = noise.epsilon ** (1 / 3)
        return tuple(min(middle * factor * offset, LARGEST_STEP) for factor in (RATIO, 1.0, 1 / RATIO))
    return tuple(step * offset for step in FIRST_STEPS)


@dataclass(frozen=True)
class _Entry:
    """An extrapolated slope, and the parts of its error bar."""

    value: float
    truncation: float
    rounding: float
    jump: float
    finest: float

    @property
    def error_bar(self) -> float:
        return self.truncation + self.rounding + abs(self.jump) / 2


_NONE = _Entry(math.nan, math.inf, 0.0, 0.0, math.inf)


class _Table:
    """Values of f at falling steps, and the best slope that they give."""

    def __init__(self, along: Along, center: float, noise: Noise) -> None:
        self._along = along
        self._noise = noise
        self._center = center
        self._central: dict[float, float] = {}  # step: T
        self._bend: dict[float, float] = {}  # step: S
        self._tried: list[float] = []

    def add(self, step: float) -> None:
        """Evaluate at one more step; a step that leaves f's domain gives nothing."""
        self._tried.append(step)
        right, left = self._along(step), self._along(-step)
        if math.isfinite(right) and math.isfinite(left):
            self._central[step] = (right - left) / (2 * step)
            self._bend[step] = (right - 2 * self._center + left) / step

    def next_step(self) -> float | None:
        """Smaller where truncation or a kink is the larger error, larger where rounding is; None: neither helps."""
        best, smaller, larger = self.best(), min(self._tried) / RATIO, max(self._tried) * RATIO
        if best.rounding > 0.5 * best.error_bar:
            grown = larger <= LARGEST_STEP and best.finest * RATIO**2 >= max(self._tried)
            return larger if grown and len(self._central) == len(self._tried) else None
        helps = smaller >= SMALLEST_STEP and self._rounding(smaller) < best.error_bar
        return smaller if helps else None

    def is_kinked(self) -> bool:
        """Whether the slopes' difference stays, or grows, as the step falls; where f is smooth it falls with h^3."""
        best, pairs = self.best(), list(pairwise(sorted(self._central, reverse=True)))
        jumps = [abs(self._jump(*pair)) for pair in pairs if 4 * self._rounding(pair[1]) < abs(best.jump)][-3:]
        return len(jumps) > 1 and min(jumps) > 0 and all(a < 3 * b for a, b in pairwise(jumps))

    def best(self) -> _Entry:
        """The entry with the smallest error bar."""
        steps = sorted(self._central, reverse=True)
        spans = [steps[first:last] for last in range(2, len(steps) + 1) for first in range(max(last - 3, 0), last - 1)]
        return min(map(self._entry, spans), key=lambda entry: entry.error_bar, default=_NONE)

    def _rounding(self, step: float) -> float:
        return ROUNDING * self._noise.sigma / step

    def _entry(self, steps: list[float]) -> _Entry:
        """Neville's extrapolation in h^2 over neighbouring steps."""
        column = better = [self._central[step] for step in steps]
        for depth in range(1, len(steps)):
            better = column
            ratios = [(steps[i] / steps[i + depth]) ** 2 for i in range(len(steps) - depth)]
            column = [(r * better[i + 1] - better[i]) / (r - 1) for i, r in enumerate(ratios)]
        truncation = 2 * abs(column[0] - better[-1])
        return _Entry(column[0], truncation, self._rounding(steps[-1]), self._jump(*steps[-2:]), steps[-1])

    def _jump(self, step: float, smaller: float) -> float:
        """The limit of S, where it stands out of the rounding."""
        ratio = step / smaller
        limit = (ratio * self._bend[smaller] - self._bend[step]) / (ratio - 1)
        return limit if abs(limit) > 4 * self._rounding(smaller) else 0.0
