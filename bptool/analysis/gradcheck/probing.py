"""What probes share: what they are given, what they answer, and when two gradients are the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bptool.analysis.gradcheck.differences import Noise
from bptool.analysis.gradcheck.directions import Directions
from bptool.analysis.gradcheck.result import Verdict
from bptool.analysis.gradcheck.subject import Gradients, Subject, inner

HOLDS = "the same gradient"
_LONGEST = 90


@dataclass(frozen=True)
class Setting:
    """What a probe is given: the subject, the gradient, how exact values are, and each tensor's verdict."""

    subject: Subject
    gradients: Gradients
    noise: Noise
    verdicts: Mapping[str, Verdict]

    @property
    def wrong(self) -> bool:
        """Whether a gradient is known to be wrong already."""
        return "wrong" in self.verdicts.values()

    @property
    def finite(self) -> bool:
        """Whether all gradients are."""
        return all(grad is None or bool(torch.isfinite(grad).all()) for grad in self.gradients.values())

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
    """Whether gradients are those that were judged (or the reference); NaN equals NaN.

    What is another at each run is compared with nothing.
    """
    reference = setting.gradients if reference is None else reference
    tolerance = 1e6 * setting.noise.epsilon
    names = [name for name in reference if setting.verdicts[name] != "nondeterministic"]
    distances = {name: apart for name in names if (apart := _apart(found[name], reference[name]))}
    largest = max(map(_size, [*reference.values(), *setting.gradients.values()]), default=0.0) if distances else 0.0
    for name, apart in distances.items():
        size = _size(reference[name])
        # What is rounding beside the other tensors' gradients may be other rounding.
        if not apart <= tolerance * max(size, 1e-4 * largest):
            return Answer(False, f"the gradient of {name} {_differs(apart, size)}")
    return Answer(True, good if names else "nothing to ask: the gradient is another at each run")


def _differs(apart: float, size: float) -> str:
    if not math.isfinite(apart):
        return "is not finite then"
    return f"differs by {apart / size if size else math.inf:.1e} of its norm"


def first_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= _LONGEST else f"{lines[0][:_LONGEST]}..."


def _apart(found: Tensor | None, right: Tensor | None) -> float:
    zero = right if found is None else found
    if zero is None or (found is not None and right is not None and torch.equal(found, right)):
        return 0.0
    none = torch.zeros_like(zero)
    found, right = none if found is None else found, none if right is None else right
    both_nan = found.isnan() & right.isnan()
    same = both_nan | (found == right)  # also where both are infinite
    difference = torch.where(same, 0, found - right)
    return math.sqrt(inner(difference, difference))


def _size(grad: Tensor | None) -> float:
    """Norm of the elements that are finite."""
    if grad is None:
        return 0.0
    finite = torch.where(torch.isfinite(grad), grad, 0)
    return math.sqrt(inner(finite, finite))
