"""What probes share: what they are given, what they answer, and when two gradients are the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bptool.analysis.gradcheck.differences import Noise
from bptool.analysis.gradcheck.directions import Directions
from bptool.analysis.gradcheck.subject import Gradients, Subject, inner

HOLDS = "the same gradient"
_LONGEST = 90


@dataclass(frozen=True)
class Setting:
    """What a probe is given: the subject, the gradient, how exact values are, and whether the gradient is wrong."""

    subject: Subject
    gradients: Gradients
    noise: Noise
    wrong: bool

    def directions(self, gradients: Gradients | None = None) -> Directions:
        """Directions to measure along, for another gradient too."""
        floor = self.noise.sigma / self.noise.epsilon * 1e-11
        return Directions(self.subject, gradients or self.gradients, self.noise, floor)

    def smooth_names(self) -> list[str]:
        """Leaves to move at once."""
        return [name for name, leaf in self.subject.leaves.items() if leaf.base.numel()]


@dataclass(frozen=True)
class Answer:
    """What a probe found."""

    holds: bool
    detail: str


def compared(setting: Setting, found: Gradients, good: str, *, reference: Gradients | None = None) -> Answer:
    """Whether gradients are those that were judged (or the reference); NaN equals NaN."""
    reference = setting.gradients if reference is None else reference
    tolerance = 1e6 * setting.noise.epsilon
    largest = max(map(_norm, [*reference.values(), *setting.gradients.values()]), default=0.0)
    for name, right in reference.items():
        apart = _apart(found[name], right)
        # What is rounding beside the other tensors' gradients may be other rounding.
        if not apart <= tolerance * max(_norm(right), 1e-4 * largest):
            ratio = apart / _norm(right) if _norm(right) else math.inf
            return Answer(False, f"the gradient of {name} differs by {ratio:.1e} of its norm")
    return Answer(True, good)


def first_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= _LONGEST else f"{lines[0][:_LONGEST]}..."


def _apart(found: Tensor | None, right: Tensor | None) -> float:
    zero = right if found is None else found
    if zero is None:
        return 0.0
    none = torch.zeros_like(zero)
    found, right = none if found is None else found, none if right is None else right
    both_nan = found.isnan() & right.isnan()
    same = both_nan | (found == right)  # also where both are infinite
    return _norm(torch.where(same, 0, found - right))


def _norm(grad: Tensor | None) -> float:
    return 0.0 if grad is None else math.sqrt(inner(grad, grad))
