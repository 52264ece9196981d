"""Whether the check's own directions show that a gradient is wrong.

The slopes along them do not depend on the backward, so those that were measured for the verdicts serve for each mutated
gradient, too: along direction v the error e of a gradient moves <g, v> by <e, v>, and the check sees it where that
leaves the error bar, whatever the differences' own error within the bar is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bptool.analysis.gradcheck.directions import Directions, Look
from bptool.analysis.gradcheck.subject import Gradients, inner

ROUNDING = 1e-12
"""Two computations of one gradient may be so far apart, relative to its norm."""

_OF_OTHERS = 1e-4
"""Times the floor: rounding of larger gradients that meet in a smaller one."""


@dataclass(frozen=True)
class Caught:
    """What the check makes of a mutated gradient.

    Attributes:
        changed: names of the tensors in whose gradient there is an error beyond rounding.
        seen: whether a direction shows it.
        tensor: the one in which it stands out most against what would have been caught.
        relative_error: ||e|| / ||g|| of that tensor; None: its gradient is zero.
        detectable: the smallest such error that would have been caught in it; None: none is known.
    """

    changed: tuple[str, ...]
    seen: bool
    tensor: str | None = None
    relative_error: float | None = None
    detectable: float | None = None
    finite: bool = True


class Eye:
    """The check's directions, and what was measured along them.

    Args:
        detectable: the smallest error that they would have caught, by tensor; None where none is known.
    """

    def __init__(self, directions: Directions, looks: Sequence[Look], detectable: Mapping[str, float | None]) -> None:
        self._directions = directions
        self._looks = looks
        self._detectable = detectable

    def sees(self, gradients: Gradients) -> Caught:
        """Judge a gradient as the check would."""
        errors = {name: error for name in gradients if (error := self._error(name, gradients[name])) is not None}
        changed = tuple(errors)
        for name, error in errors.items():
            if not torch.isfinite(error).all():
                return Caught(changed, True, name, None, self._detectable.get(name), finite=False)
        if not errors:
            return Caught((), False)
        name = max(errors, key=lambda one: self._standing_out(one, errors[one]))
        seen = any(self._is_outside(look, errors) for look in self._looks)
        return Caught(changed, seen, name, self._relative(name, errors[name]), self._detectable.get(name))

    def _error(self, name: str, gradient: Tensor | None) -> Tensor | None:
        right = self._directions.gradients[name]
        if right is None or not right.numel():
            return None
        error = -right if gradient is None else gradient - right
        beyond = math.sqrt(inner(error, error)) * self._directions.scales[name]
        norm, floor = self._directions.norm(name), self._directions.floor
        rounding = ROUNDING * norm + _OF_OTHERS * floor if norm > floor else floor
        return None if beyond <= rounding else error

    def _relative(self, name: str, error: Tensor) -> float | None:
        norm, size = self._directions.norm(name), math.sqrt(inner(error, error)) * self._directions.scales[name]
        return size / norm if norm > self._directions.floor else None

    def _standing_out(self, name: str, error: Tensor) -> float:
        relative, seen = self._relative(name, error), self._detectable.get(name)
        return (relative or 0.0) / seen if seen else 0.0

    def _is_outside(self, look: Look, errors: dict[str, Tensor]) -> bool:
        moved = [name for name in look.names if name in errors]
        if not moved:
            return False
        direction = self._directions.draw_again(moved, look.names, look.purpose)
        by = sum(inner(errors[name], direction[name]) for name in moved)
        # Twice, as in what is called detectable: whatever the differences' own error is, this is beyond the bar.
        return abs(by) > 2 * look.measured.error_bar
