"""A verdict on each tensor's gradient.

Tensors are first checked in groups, with K = 4 directions (3 of a large target) for each group in which all of its
tensors move at once; the norms are evened out, so that no tensor hides behind another. As an error of any one of them
shows in the sum, a group that agrees acquits all its tensors, and the cost does not grow with their number. A group
that does not is taken apart, as is what has no gradient to speak of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bptool.analysis.gradcheck.connection import connection, partial_cut
from bptool.analysis.gradcheck.differences import EPSILON, Noise
from bptool.analysis.gradcheck.directions import (
    LARGE,
    Directions,
    Look,
    Measured,
    detectable,
    relative_bar,
    relative_error,
    rms_slope,
)
from bptool.analysis.gradcheck.location import locate
from bptool.analysis.gradcheck.result import TensorCheck, Verdict
from bptool.analysis.gradcheck.subject import Gradients, Leaf, Subject, inner
from bptool.analysis.gradcheck.tangents import forward_slope

N_DIRECTIONS, N_DIRECTIONS_OF_LARGE = 4, 3
N_GROUPS, N_GROUPS_OF_LARGE = 8, 2
"""So many groups at most; each evaluation of a large target counts."""
_QUESTIONS, _QUESTIONS_OF_LARGE = 120, 48
"""Measurements in all that may be spent on where wrong entries are."""
TOO_COARSE = 5e-4
"""A check that cannot see an error of this relative size certifies nothing."""
_NOTHING = 1e-11
"""A gradient below this share of the largest one is rounding."""
NOT_FINITE = "its gradient is not finite"
_CONSTANT_IN_FLOAT32 = (1e-8, torch.finfo(torch.float32).eps / 2)
"""What rounding to float32 leaves of a constant: PyTorch's own hardsigmoid has its 1/6 so."""
_SHIFT = 1e-2


class Verdicts:
    """Judges the leaves of a subject.

    Args:
        repeated: the gradient of a second, equal evaluation.

    Attributes:
        looks: the directions along which differences and backward were found to agree.
    """

    def __init__(self, subject: Subject, gradients: Gradients, repeated: Gradients, noise: Noise) -> None:
        self.subject = subject
        self.gradients = gradients
        self.repeated = repeated
        self.noise = noise
        self.directions = Directions(subject, gradients, noise, floor=0.0)
        largest = max((self.directions.norm(name) for name in subject.leaves), default=0.0)
        # The noise of L over epsilon is the size of what L is summed from.
        self.looks: list[Look] = []
        self._large = subject.n_elements > LARGE
        self._n_directions = N_DIRECTIONS_OF_LARGE if self._large else N_DIRECTIONS
        self._questions = _QUESTIONS_OF_LARGE if self._large else _QUESTIONS
        self.directions.floor = max(largest, noise.sigma / noise.epsilon) * _NOTHING

    def all(self) -> list[TensorCheck]:
        """One verdict for each leaf, in their order."""
        found = {tensor.name: tensor for tensor in self.each()}
        for name in reversed(self.subject.leaves):  # the error's source is nearest to the loss
            if found[name].verdict == "wrong" and found[name].location is None:
                found[name] = found[name].model_copy(update={"location": self._location(name)})
        return [found[name] for name in self.subject.leaves]

    def each(self) -> Iterator[TensorCheck]:
        """The same verdicts as they are found, before it is known where wrong entries are."""
        ordinary: list[str] = []
        for name, leaf in self.subject.leaves.items():
            early = self._without_differences(leaf)
            if early is not None:
                yield early
            elif self.directions.norm(name) > 100 * self.directions.floor:
                ordinary.append(name)
            else:
                yield self._alone(leaf)
        for group in self._groups(ordinary):
            yield from self._group(group)

    def _without_differences(self, leaf: Leaf) -> TensorCheck | None:
        """What is known of a tensor before the function is evaluated anywhere else."""
        grad, again = self.gradients[leaf.name], self.repeated[leaf.name]
        if leaf.base.numel() == 0:
            return record(leaf, "right", detail="it has no elements")
        if grad is not None and not torch.isfinite(grad).all():
            return record(leaf, "wrong", location=_first_nonfinite(grad), detail=NOT_FINITE)
        if _differ(grad, again, 1e6 * self.noise.epsilon):
            return record(leaf, "nondeterministic", detail="a second backward gives another gradient")
        if grad is not None and torch.count_nonzero(grad):
            return None
        path = connection(self.subject, leaf)
        if path.live:
            return None
        cut = ", ".join(path.cuts) or None
        return record(leaf, "not_connected", cut_by=cut, detail="" if cut else "no output depends on it")

    def _group(self, names: Sequence[str]) -> Iterator[TensorCheck]:
        leaves = self.subject.leaves
        measured = self._agreeing(names)
        if not measured:
            yield from (self._alone(leaves[name]) for name in names)
            return
        self._keep(names, measured)
        weights = self.directions.weights(names)
        for name in names:
            norm = self.directions.norm(name) * weights[name]
            error, bar = (
                math.hypot(*sizes) / (norm * math.sqrt(self._n_directions))
                for sizes in ([one.difference for one in measured], [one.error_bar for one in measured])
            )
            seen = detectable(measured, norm)
            yield (
                record(leaves[name], "right", error=error, bar=bar, seen=seen)
                if seen < TOO_COARSE
                else self._alone(leaves[name])
            )

    def _agreeing(self, names: Sequence[str]) -> list[Measured]:
        """What is measured along a group's directions; nothing for one tensor, or as soon as one does not agree."""
        measured: list[Measured] = []
        for k in range(self._n_directions if len(names) > 1 else 0):
            one = self.directions.measure(self.directions.draw(names, k))
            if not one.agrees or one.jump or not math.isfinite(one.difference):
                return []
            measured.append(one)
        return measured

    def _alone(self, leaf: Leaf) -> TensorCheck:
        draws = [self.directions.draw([leaf.name], k) for k in range(2 if self._large else N_DIRECTIONS)]
        measured = [self.directions.measure(draw) for draw in draws]
        norm = self.directions.norm(leaf.name)
        size = max(norm, rms_slope(measured))  # where the gradient is wrong, it may be too small
        error, bar, seen = relative_error(measured), relative_bar(measured), detectable(measured, size)
        if any(one.jump for one in measured):
            return self._at_kink(leaf, error, bar, seen)
        off = [draw for draw, one in zip(draws, measured, strict=True) if not one.agrees]
        if off and any(map(self.directions.confirmed, off)):
            factor = common_factor(measured)
            if factor is not None and _CONSTANT_IN_FLOAT32[0] < abs(factor - 1) < _CONSTANT_IN_FLOAT32[1]:
                detail = f"it is {factor:.10g} times the true gradient: a constant that is exact to float32 only"
                return record(leaf, "precision_limited", error=error, bar=bar, seen=seen, detail=detail)
            return self._wrong(leaf, measured, seen)
        self._keep([leaf.name], measured)
        if norm <= self.directions.floor:
            detail = "its gradient is zero, or rounding, and so are the finite differences"
            return record(leaf, "structurally_zero", error=0.0, bar=None, seen=None, detail=detail)
        if not seen < TOO_COARSE:
            detail = _why_coarse(measured, self.noise)
            return record(leaf, "precision_limited", error=error, bar=bar, seen=seen, detail=detail)
        return record(leaf, "right", error=error, bar=bar, seen=seen)

    def _keep(self, names: Sequence[str], measured: Sequence[Measured]) -> None:
        self.looks += [Look(tuple(names), k, one) for k, one in enumerate(measured) if one.agrees]

    def _wrong(self, leaf: Leaf, measured: Sequence[Measured], seen: float) -> TensorCheck:
        draw = self.directions.draw([leaf.name], "second oracle")
        return record(
            leaf,
            "wrong",
            error=relative_error(measured),
            bar=relative_bar(measured),
            seen=seen,
            cut_by=partial_cut(self.subject, leaf),
            detail="; ".join(filter(None, [self._shape_of_error(leaf, measured), self._second_oracle(draw)])),
        )

    def _shape_of_error(self, leaf: Leaf, measured: Sequence[Measured]) -> str:
        factor = common_factor(measured)
        if self.gradients[leaf.name] is None:
            return "the backward gives it none"
        if factor is None:
            return ""
        return "it is zero" if factor == 0 else f"it is {factor:.6g} times the true gradient"

    def _location(self, name: str) -> str | None:
        """Where the wrong entries are; None where too much has been asked already."""
        if self._questions <= 0:
            return None
        leaf, draw = self.subject.leaves[name], self.directions.draw([name], "location")[name]

        def wrong(mask: Tensor) -> bool:
            self._questions -= 1
            return not self.directions.glance({name: draw * mask}).agrees

        return locate(leaf.base.shape, wrong, leaf.base.device, most=self._questions)

    def _groups(self, names: Sequence[str]) -> list[list[str]]:
        most = N_GROUPS_OF_LARGE if self._large else N_GROUPS
        return [list(names[start::most]) for start in range(min(most, len(names)))]

    def _second_oracle(self, draw: dict[str, Tensor]) -> str:
        """What forward mode says: it shares nothing with the backward but the operations."""
        try:
            forward = forward_slope(self.subject, draw) or 0.0
        except Exception:  # whatever an operation without forward mode raises
            return ""
        one = self.directions.measure(draw)
        close = abs(forward - one.by_differences) <= one.error_bar
        if close:
            return "forward-mode jvp agrees with the differences: it is the backward's formula"
        if abs(forward - one.by_backward) <= one.error_bar:
            return "forward-mode jvp agrees with the backward: both miss a path that the values take"
        return "forward-mode jvp agrees with neither"

    def _at_kink(self, leaf: Leaf, error: float, bar: float, seen: float) -> TensorCheck:
        """At a kink no number is the gradient; a step aside from it there is one, and there it is judged."""
        subject = self.subject
        aside = {name: _aside(subject, other) for name, other in subject.leaves.items() if other.base.numel()}
        with subject.shifted(aside):
            _, gradients = subject.gradient()
            there = Directions(subject, gradients, self.noise, self.directions.floor)
            draws = [there.draw([leaf.name], "aside", k) for k in range(N_DIRECTIONS)]
            measured = [there.measure(draw) for draw in draws]
            off = [d for d, one in zip(draws, measured, strict=True) if not one.agrees and not one.jump]
            if off and any(map(there.confirmed, off)):
                beside = "it is at a kink here, and wrong beside it too"
                return record(
                    leaf, "wrong", error=relative_error(measured), bar=bar, seen=seen, location=None, detail=beside
                )
        return record(leaf, "kink", error=error, bar=bar, seen=None, detail="left and right slopes differ here")


def _aside(subject: Subject, leaf: Leaf) -> Tensor:
    generator = subject.generator("aside", leaf.name)
    drawn = torch.randn(leaf.base.shape, generator=generator, dtype=torch.float64).to(leaf.base.device)
    return (drawn * (_SHIFT * leaf.scale)).to(leaf.base.dtype)


def _differ(grad: Tensor | None, again: Tensor | None, tolerance: float) -> bool:
    """Whether two gradients that should be one are further apart than rounding explains."""
    if grad is None or again is None:
        return (grad is None) != (again is None)
    apart = grad - again
    return inner(apart, apart) > tolerance**2 * inner(grad, grad)


def common_factor(measured: Sequence[Measured]) -> float | None:
    """The factor that a gradient is wrong by, where every direction shows the same one."""
    ratios = sorted(one.by_backward / one.by_differences for one in measured if one.by_differences)
    if len(ratios) < 2 or not all(map(math.isfinite, ratios)):
        return None
    middle = ratios[len(ratios) // 2]
    blur = max(one.error_bar / abs(one.by_differences) for one in measured if one.by_differences)
    return middle if ratios[-1] - ratios[0] <= 1e-4 * abs(middle - 1) + 2 * blur else None


def _why_coarse(measured: Sequence[Measured], noise: Noise) -> str:
    if not all(math.isfinite(one.by_differences) for one in measured):
        return "the function is not finite beside this point"
    if noise.epsilon > EPSILON:
        return "the forward computes in a lower precision than float64"
    return "the function's rounding hides its slope"


def _first_nonfinite(grad: Tensor) -> str:
    bad = (~torch.isfinite(grad)).nonzero()
    if len(bad) == grad.numel():
        return "everywhere"
    first = "[" + ", ".join(str(int(i)) for i in bad[0]) + "]"
    return first if len(bad) == 1 else f"{first} and {len(bad) - 1} more"


def record(
    leaf: Leaf,
    verdict: Verdict,
    *,
    error: float | None = None,
    bar: float | None = None,
    seen: float | None = None,
    location: str | None = None,
    cut_by: str | None = None,
    detail: str = "",
) -> TensorCheck:
    """A leaf's verdict: its relative error, that error's bar, and the smallest error that would have been seen."""
    return TensorCheck(
        name=leaf.name,
        kind="parameter" if leaf.kind == "parameter" else "input",
        shape=list(leaf.base.shape),
        verdict=verdict,
        relative_error=error,
        error_bar=bar,
        detectable_relative_error=seen,
        location=location,
        cut_by=cut_by,
        detail=detail,
    )
