"""What an identity's check says, and how near two computations of the same numbers must come.

A float64 sum of n terms is off by at most n u times the sum of the terms' absolute values, whatever their order
(Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1; u: half the distance of 1 to the next
number). So each check knows its bound: its operation count times u times the same formula with absolute values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from bptool.analysis.result import Record

_UNDERFLOW = 1e6
"""Times the smallest normal number: what may be lost where products underflow."""


class Identity(Record):
    """One identity of backpropagation on the model at hand.

    Attributes:
        relative_error: norm of the difference of the two sides, over the norm of the side that the formula gives.
        tolerance: what rounding alone may make of it; an identity must hold for each element, too.
        detail: a sentence with the figures.
        figures: the same as numbers, for whoever draws them.
    """

    name: str
    holds: bool
    relative_error: float
    tolerance: float
    detail: str
    figures: dict[str, float] = Field(default_factory=dict)


class Identities(Record):
    """All that could be checked, and what could not, with the reason."""

    identities: list[Identity]
    left_out: list[str]


@dataclass(frozen=True)
class Agreement:
    """Whether two computations of the same numbers agree, and where they don't most."""

    holds: bool
    relative_error: float
    tolerance: float
    where: str


def rounding_unit(dtype: torch.dtype) -> float:
    """Half the distance of 1 to the next number: the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def agree(actual: Tensor | None, expected: Tensor, bound: Tensor, where: str) -> Agreement:
    """Whether each element is within its `bound` of what is expected.

    Args:
        actual: None: there is no gradient at all.
        where: what is compared, in words, as in "layer 2".
    """
    if actual is None:
        return Agreement(False, math.inf, _ratio(bound.norm(), expected.norm()), f"{where}: no gradient arrives")
    off = (actual - expected).abs()
    bound = bound + _UNDERFLOW * torch.finfo(bound.dtype).tiny
    outside = ~(off <= bound)  # NaN is outside
    error, tolerance = _ratio((actual - expected).norm(), expected.norm()), _ratio(bound.norm(), expected.norm())
    if not outside.any():
        # Where all of it may be rounding, as the scores' gradient of a token that sees itself alone, both sides are 0.
        return Agreement(True, error, tolerance, where) if tolerance < 1 else Agreement(True, 0.0, 0.0, where)
    worst = torch.where(outside, (off / bound.clamp(min=1e-300)).nan_to_num(math.inf), 0).argmax()
    place = [int(index) for index in torch.unravel_index(worst, actual.shape)]
    found, right = float(actual.flatten()[worst]), float(expected.flatten()[worst])
    text = f"{where}: {int(outside.sum())} of {actual.numel()} elements are wrong, the worst at {place}"
    return Agreement(False, error, tolerance, f"{text}: {found:.6g} instead of {right:.6g}")


def agree_as_one(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], tolerance: float
) -> Agreement:
    """Whether two gradients of a whole model, each taken as one long vector, agree to a relative error."""
    error = {name: _squared(actual.get(name), expected.get(name)) for name in actual.keys() | expected.keys()}
    norm = sum(_squared(right, None) for right in expected.values()) if any(error.values()) else 0.0
    total = math.sqrt(sum(error.values())) if all(map(math.isfinite, error.values())) else math.nan
    relative = 0.0 if total == 0 else total / math.sqrt(norm) if norm else math.inf
    worst = max(error, key=lambda name: math.inf if math.isnan(error[name]) else error[name], default="")
    return Agreement(relative <= tolerance, relative, tolerance, f"most in {worst}" if relative else "")


def as_identity(
    name: str, agreements: Sequence[Agreement], detail: str, figures: Mapping[str, float] | None = None
) -> Identity:
    """The worst of several agreements; `detail` is followed by where it fails."""
    worst = max(agreements, key=_severity)
    wrong = "" if worst.holds else f"; it does not hold: {worst.where}"
    error = f"off by {worst.relative_error:.1e}, rounding allows {worst.tolerance:.1e}"
    if worst.relative_error == 0:
        error = "no difference at all"
    elif math.isinf(worst.relative_error):
        error = "there is nothing to compare"
    return Identity(
        name=name,
        holds=worst.holds,
        relative_error=worst.relative_error,
        tolerance=worst.tolerance,
        detail=f"{detail}: {error}{wrong}",
        figures=dict(figures or {}),
    )


def _squared(left: Tensor | None, right: Tensor | None) -> float:
    """The squared norm of left - right, where None is 0."""
    if left is not None and right is not None and left.dtype == right.dtype and torch.equal(left, right):
        return 0.0
    zero = torch.zeros(())
    both = (zero if left is None else left.double()) - (zero if right is None else right.double())
    return float(both.square().sum())


def _severity(agreement: Agreement) -> tuple[bool, float]:
    error = agreement.relative_error
    return not agreement.holds, math.inf if math.isnan(error) else error


def _ratio(part: Tensor, whole: Tensor) -> float:
    if float(part) == 0:
        return 0.0
    return float(part / whole) if float(whole) else math.inf
