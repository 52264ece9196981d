"""The truth that estimators estimate: the gradient of what a function gives on average.

Where choices are drawn (`torch.multinomial`, `torch.bernoulli`, and so `torch.distributions`) the mean is the sum over
all paths of probability times value. Its slopes are central differences with each path's choices held fast: over all
paths where there are few enough, else over paths that are drawn, each over its own probability.

Where a choice is a hard function (rounding), the mean is flat between jumps; it has a gradient once noise is added to
what is rounded, Gaussian, as large as what the hard step itself changes. With noise y = soft + sigma eps that gradient
is the mean of (value - level) eps / sigma (Williams 1992, section 6), here over pairs of noise and its mirror image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bptool.analysis.gradcheck.choices import Path, all_paths, drawn, followed
from bptool.analysis.gradcheck.estimates import Directions, Means
from bptool.model.estimators import Watcher, watched_by

Run = Callable[[], Tensor]

_NARROW = 0.05
"""Share of the mean at which an interval is narrow enough."""
_AT_ONCE = 64
"""Samples between two looks at the interval."""


@dataclass(frozen=True)
class Truth:
    """Along each direction: the slope of the mean, and the half-width of its interval."""

    method: Literal["enumeration", "sampling", "smoothing"]
    slopes: Tensor
    interval: Tensor


def few_paths(run: Run, most: int) -> list[Path]:
    """All paths of a function, or none where there are more than `most`."""
    found: list[Path] = []
    with torch.no_grad():
        for path in all_paths(run):
            if len(found) == most or _roughly(path) > 100 * most:
                return []
            found.append(path)
    return found


def enumerated(run: Run, where: Directions, paths: Sequence[Path]) -> Truth:
    """Exact but for the differences' own error."""
    slopes = torch.stack([_path_slopes(run, where, path, 0.0) for path in paths]).sum(0)
    return Truth("enumeration", slopes, torch.zeros_like(slopes))


def sampled(run: Run, where: Directions, generator: torch.Generator, most: int) -> Truth:
    """Drawn paths; what all values have in common moves no mean, and without it there is less noise."""
    means = Means(len(where.units))
    with torch.no_grad():
        common = sum(float(drawn(run, generator).value) for _ in range(_AT_ONCE)) / _AT_ONCE
        while means.count * 4 * len(where.units) < most and not means.narrow(_NARROW):
            for _ in range(_AT_ONCE):
                path = drawn(run, generator)
                means.add(_path_slopes(run, where, path, common) / path.probability)
    return Truth("sampling", means.mean, means.interval())


def smoothed(run: Run, where: Directions, generator: torch.Generator, sizes: Sequence[float], most: int) -> Truth:
    """Of a function whose hard steps are smoothed by noise.

    Args:
        sizes: standard deviation of the noise at each hard step, as `HardSteps` found them.
    """
    with torch.no_grad():
        level = float(run())
    means = Means(len(where.units))
    while 2 * means.count < most and not means.narrow(_NARROW):
        for _ in range(_AT_ONCE):
            means.add(where.along(_smoothed_gradient(run, where.tensor, _Noise(generator, sizes), level)))
    return Truth("smoothing", means.mean, means.interval())


class HardSteps(Watcher):
    """Looks at every hard value, which it leaves as it is.

    Attributes:
        all_known: whether each comes with the function that makes it.
        sizes: by how much each differs from its soft value, root mean square.
    """

    def __init__(self) -> None:
        self.all_known = True
        self.sizes: list[float] = []

    def straight_through(self, hard: Tensor, soft: Tensor, function: Callable[[Tensor], Tensor] | None) -> None:
        """As `Watcher` has it."""
        self.all_known &= function is not None
        self.sizes.append(float((hard - soft.detach()).square().mean().sqrt()))


class _Noise(Watcher):
    """Adds noise to what hard functions get, and takes down its log density as a function of the soft values."""

    def __init__(self, generator: torch.Generator, sizes: Sequence[float]) -> None:
        self._generator, self._sizes = generator, sizes
        self._drawn: list[Tensor] = []
        self._sign = 1.0
        self._calls = 0
        self.log_densities: list[Tensor] = []

    def mirror(self) -> None:
        """The same noise with another sign, for a second run."""
        self._sign, self._calls, self.log_densities = -1.0, 0, []

    def straight_through(self, hard: Tensor, soft: Tensor, function: Callable[[Tensor], Tensor] | None) -> Tensor:
        """The hard value of noisy input, through which no gradient goes."""
        if self._calls == len(self._drawn):
            self._drawn.append(torch.randn(soft.shape, generator=self._generator, dtype=torch.float64).to(soft))
        noise, sigma = self._sign * self._drawn[self._calls], self._sizes[self._calls]
        self._calls += 1
        if sigma == 0 or function is None:
            return hard
        noisy = soft.detach() + sigma * noise
        self.log_densities.append(-0.5 * ((noisy - soft) / sigma).square().sum())
        with torch.no_grad():
            return function(noisy).to(soft.dtype)


def _smoothed_gradient(run: Run, tensor: Tensor, noise: _Noise, level: float) -> Tensor:
    """One sample: noise and its mirror image."""
    total = torch.zeros_like(tensor)
    for _ in range(2):
        with watched_by(noise):
            value = run()
        scores = [(value.detach() - level) * density for density in noise.log_densities if density.requires_grad]
        for end in (*scores, *([value] if value.requires_grad else [])):
            (part,) = torch.autograd.grad(end, tensor, allow_unused=True, retain_graph=True)
            if part is not None:
                total += part.detach() / 2
        noise.mirror()
    return total


def _path_slopes(run: Run, where: Directions, path: Path, common: float) -> Tensor:
    """Slopes of probability * (value - common) with the path's choices held fast."""

    def value() -> float:
        there = followed(run, path.taken)
        return there.probability * (float(there.value) - common)

    return where.slopes(value)


def _roughly(path: Path) -> int:
    """How many paths there are, if all have as many options at each draw as this one."""
    return math.prod(sum(probability > 0 for probability in options) for options in path.options)
