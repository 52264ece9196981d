"""Means of noisy numbers with their intervals, along some directions of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

_MISTAKEN = 1e-3
"""In how many of all checks chance alone may take some mean out of its interval."""
_LEAST = 256
"""Samples before a mean may be taken for normal."""
_STEP = 1e-3
_MOST_DIRECTIONS = 12


class Means:
    """Running mean and variance of vectors, by Welford's update."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self._squares = torch.zeros(size, dtype=torch.float64)

    def add(self, sample: Tensor) -> None:
        """Take note of one more."""
        self.count += 1
        before = sample.double() - self.mean
        self.mean = self.mean + before / self.count
        self._squares += before * (sample.double() - self.mean)

    def variance(self) -> Tensor:
        """Of one sample."""
        return self._squares / max(self.count - 1, 1)

    def interval(self) -> Tensor:
        """Half-widths that hold for all the means at once, in 999 of 1000 checks (Bonferroni's inequality)."""
        width = NormalDist().inv_cdf(1 - _MISTAKEN / (2 * max(self.mean.numel(), 1)))
        return width * (self.variance() / max(self.count, 1)).sqrt()

    def narrow(self, share: float) -> bool:
        """Whether the intervals are so small a share of the means, all taken together."""
        return self.count >= _LEAST and float(self.interval().norm()) <= share * float(self.mean.norm())


@dataclass(frozen=True)
class Directions:
    """A tensor and unit directions in it: every axis where it is small, else some Gaussian ones."""

    tensor: Tensor
    units: tuple[Tensor, ...]

    def along(self, gradient: Tensor) -> Tensor:
        """A gradient's part in each direction."""
        return torch.stack([(gradient * unit).sum() for unit in self.units]).double().cpu()

    def slopes(self, value: Callable[[], float]) -> Tensor:
        """Central differences of fourth order along each direction; the tensor is moved, and put back."""
        size = float(self.tensor.detach().square().mean().sqrt())
        step = _STEP * (size or 1.0) * math.sqrt(self.tensor.numel())
        found = []
        for unit in self.units:
            near = self._at(value, unit, step) - self._at(value, unit, -step)
            far = self._at(value, unit, 2 * step) - self._at(value, unit, -2 * step)
            found.append((8 * near - far) / (12 * step))
        return torch.tensor(found, dtype=torch.float64)

    def _at(self, value: Callable[[], float], unit: Tensor, step: float) -> float:
        with _moved(self.tensor, unit * step), torch.no_grad():
            return value()


def directions(tensor: Tensor, generator: torch.Generator) -> Directions:
    """Along which a tensor's gradient is looked at."""
    n = tensor.numel()
    if n <= _MOST_DIRECTIONS:
        rows = torch.eye(n, dtype=torch.float64)
    else:
        rows = torch.randn(_MOST_DIRECTIONS, n, dtype=torch.float64, generator=generator)
        rows = rows / rows.norm(dim=1, keepdim=True)
    return Directions(tensor, tuple(row.view(tensor.shape).to(tensor) for row in rows))


@contextmanager
def _moved(tensor: Tensor, change: Tensor) -> Iterator[None]:
    base = tensor.detach().clone()
    with torch.no_grad():
        tensor.add_(change)
    try:
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(base)
