"""Random directions, what is measured along them, and the smallest error that they would have shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bptool.analysis.gradcheck.differences import EPSILON, Noise, slope
from bptool.analysis.gradcheck.subject import Gradients, Leaf, Subject, gaussian_like, inner, real_view

FINE, COARSE = 1e-9, 1e-6
"""An error bar is small enough at this share of the gradient's norm: of a small target, and of a large one."""
LARGE = 1_000_000
"""Numbers to check, from which on a target is large: each evaluation counts."""
_STEPS, _FEW_STEPS = 3, 2
"""First steps along a direction, two evaluations each: of a small target, and of a large one."""
MISSED = 0.01
"""An error of the size called detectable is missed with no more than this probability."""
_BACKWARD_ROUNDING = 5e4 * EPSILON
"""Rounding of the backward itself, relative to the gradient's norm; measured errors are a hundredth of it."""


@dataclass(frozen=True)
class Measured:
    """One direction v.

    Attributes:
        by_differences: the slope of L along it.
        by_backward: <g, v>.
        error_bar: bounds what may lie between the two.
        jump: of the slope, where L has a kink; 0: it has none.
    """

    by_differences: float
    by_backward: float
    error_bar: float
    jump: float

    @property
    def difference(self) -> float:
        """What the backward's derivative is off by."""
        return self.by_differences - self.by_backward

    @property
    def agrees(self) -> bool:
        """Whether it is off by no more than the error bar; differences that are not finite say nothing."""
        return not abs(self.difference) > self.error_bar


@dataclass(frozen=True)
class Look:
    """A direction that was measured; its names and its purpose draw it again."""

    names: tuple[str, ...]
    purpose: int
    measured: Measured


class Directions:
    """Directions from a subject's seed, at the point where its leaves are now.

    Args:
        floor: the size below which a gradient's norm means nothing, as a slope of L.
    """

    def __init__(self, subject: Subject, gradients: Gradients, noise: Noise, floor: float) -> None:
        self.subject = subject
        self.gradients = gradients
        self.noise = noise
        self.floor = floor
        large = subject.n_elements > LARGE
        self.goal, self.n_steps = (COARSE, _FEW_STEPS) if large else (FINE, _STEPS)
        self.scales = {name: leaf.scale for name, leaf in subject.leaves.items()}

    @cached_property
    def value(self) -> float:
        """L at the point, evaluated once, where it is asked for."""
        return self.subject.value()

    def norm(self, name: str) -> float:
        """||g||, times the unit of a step: the standard deviation of L's slope along the tensor's directions."""
        grad = self.gradients[name]
        return 0.0 if grad is None else self.scales[name] * math.sqrt(inner(grad, grad))

    def draw(self, names: Sequence[str], *purpose: int | str) -> dict[str, Tensor]:
        """A Gaussian direction over some tensors, each weighted so that its gradient counts as much as the others'."""
        return self.draw_again(names, names, *purpose)

    def draw_again(self, wanted: Sequence[str], names: Sequence[str], *purpose: int | str) -> dict[str, Tensor]:
        """What `draw(names, *purpose)` gives of the wanted tensors among them."""
        weights = self.weights(names)
        return {name: self._draw_one(self.subject.leaves[name], weights[name], *purpose) for name in wanted}

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """What each tensor's direction is multiplied with, beside its unit."""
        norms = {name: max(self.norm(name), self.floor) for name in names}
        least = min(norms.values(), default=1.0)
        return {name: max(least / norm, 1e-3) if norm else 1.0 for name, norm in norms.items()}

    def measure(self, direction: Mapping[str, Tensor], *, offset: float = 1.0) -> Measured:
        """The slope along a direction, both ways.

        Args:
            offset: multiplies the steps.
        """
        return self._measured(direction, self.goal, self.n_steps, offset)

    def glance(self, direction: Mapping[str, Tensor]) -> Measured:
        """The same by fewer evaluations, with a larger error bar: as of a large target."""
        return self._measured(direction, COARSE, _FEW_STEPS, 1.0)

    def _measured(self, direction: Mapping[str, Tensor], goal: float, n_steps: int, offset: float) -> Measured:
        by_backward, size = self.by_backward(direction)
        # Of what is zero, it is enough to know that it is small beside the other tensors' gradients.
        goal = goal * size if size > self.floor else 1e3 * self.floor
        center = self.value
        with self.subject.values_along(direction) as value_at:
            found = slope(value_at, center, self.noise, goal=goal, offset=offset, n_steps=n_steps)
        own = size * max(_BACKWARD_ROUNDING, 16 * self.noise.epsilon)
        return Measured(found.value, by_backward, found.error_bar + own, found.jump)

    def by_backward(self, direction: Mapping[str, Tensor]) -> tuple[float, float]:
        """<g, v>, and its size for a typical v of that length."""
        shares = [inner(self._gradient(name), v) for name, v in direction.items()]
        sizes = [_norm(self._gradient(name)) * _norm(v) / math.sqrt(max(v.numel(), 1)) for name, v in direction.items()]
        return sum(shares), math.hypot(*sizes)

    def confirmed(self, direction: Mapping[str, Tensor]) -> bool:
        """Whether other steps along the same direction disagree with the backward too."""
        return not self.measure(direction, offset=0.61).agrees

    def _gradient(self, name: str) -> Tensor:
        grad = self.gradients[name]
        return torch.zeros_like(self.subject.leaves[name].base) if grad is None else grad

    def _draw_one(self, leaf: Leaf, weight: float, *purpose: int | str) -> Tensor:
        drawn = gaussian_like(leaf.base, self.subject.generator("direction", leaf.name, *purpose))
        drawn = drawn * (self.scales[leaf.name] * weight)
        return drawn if leaf.kept is None else drawn * leaf.kept


def rms_slope(measured: Sequence[Measured]) -> float:
    """Root mean square of the finite differences: an estimate of the true gradient's norm, times the unit of a step."""
    slopes = [one.by_differences for one in measured if math.isfinite(one.by_differences)]
    return math.hypot(*slopes) / math.sqrt(len(slopes)) if slopes else 0.0


def relative_error(measured: Sequence[Measured]) -> float:
    """Root of the sum of squared differences over that of squared slopes."""
    return _over_slopes([one.difference for one in measured], measured)


def relative_bar(measured: Sequence[Measured]) -> float:
    """The same of the error bars."""
    return _over_slopes([one.error_bar for one in measured], measured)


def detectable(measured: Sequence[Measured], norm: float) -> float:
    """The smallest ||e|| / ||g|| that is caught but for a probability of MISSED.

    An error e moves the difference along direction k by <e, v_k>, a normal number with standard deviation
    (||e|| / ||g||) norm. Whatever the differences' own error is, twice the error bar is beyond it; so the error is
    missed at most where all of the numbers are within: product of erf(2 bar_k / (ratio norm sqrt 2)).

    Args:
        norm: the standard deviation of the slope along the directions, ||g|| times the unit of a step.
    """
    bars = [2 * one.error_bar for one in measured]
    if not norm or not bars or not all(map(math.isfinite, bars)):
        return math.inf

    def missed(ratio: float) -> float:
        return math.prod(math.erf(bar / (ratio * norm * math.sqrt(2))) for bar in bars)

    low, high = 0.01 * min(bars) / norm, 1e4 * max(bars) / norm
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if missed(middle) > MISSED else (low, middle)
    return high


def _over_slopes(sizes: Sequence[float], measured: Sequence[Measured]) -> float:
    differences = math.hypot(*(one.by_differences for one in measured))
    backward = math.hypot(*(one.by_backward for one in measured))
    most = max(differences, backward)
    return math.hypot(*sizes) / most if most else 0.0


def _norm(tensor: Tensor) -> float:
    return float(real_view(tensor).norm().item())
