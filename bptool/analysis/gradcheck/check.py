"""Is the gradient right? One target, one seed, one record."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bptool.analysis.gradcheck.differences import EPSILON, estimate_noise
from bptool.analysis.gradcheck.directions import LARGE
from bptool.analysis.gradcheck.estimate_verdicts import estimates_of, told_as_estimates
from bptool.analysis.gradcheck.nonfinite import first_nonfinite, first_nonfinite_backward
from bptool.analysis.gradcheck.probes import probe
from bptool.analysis.gradcheck.raised_casts import raised_casts, second_look
from bptool.analysis.gradcheck.random_state import random_state_kept
from bptool.analysis.gradcheck.result import FAILING, Cost, GradcheckResult, ProbeCheck, TensorCheck
from bptool.analysis.gradcheck.subject import Gradients, Subject, gaussian_like
from bptool.analysis.gradcheck.survey import Survey, survey
from bptool.analysis.gradcheck.verdicts import NOT_FINITE, Verdicts, record
from bptool.errors import TargetError
from bptool.training.gradient_target import GradientTarget
from bptool.training.user_code import describe

PASSES, PASSES_OF_LARGE = 120, 35
"""Forwards and backwards that a check takes, about."""


def fresh_seed() -> int:
    """A seed that nobody chose; it is printed, so that a run can be repeated."""
    return secrets.randbelow(2**31)


@dataclass(frozen=True)
class _Point:
    """The gradient at the point that is checked, twice."""

    value: float
    again: float
    gradients: Gradients
    repeated: Gradients


@dataclass(frozen=True)
class Examined:
    """A check, and what it measured.

    Attributes:
        verdicts: None: the target is not finite, or not deterministic, so that nothing was measured.
    """

    result: GradcheckResult
    subject: Subject
    verdicts: Verdicts | None


def check_gradients(
    target: GradientTarget,
    *,
    seed: int,
    name: str = "the function",
    settings: Sequence[str] = (),
    sizes_cut: Sequence[str] = (),
) -> GradcheckResult:
    """Whether every parameter's and input's gradient of a target is right; the arguments are those of `examine`."""
    return examine(target, seed=seed, name=name, settings=settings, sizes_cut=sizes_cut).result


def examine(
    target: GradientTarget,
    *,
    seed: int,
    name: str = "the function",
    settings: Sequence[str] = (),
    sizes_cut: Sequence[str] = (),
    expected: Callable[[float, int], None] = lambda pass_s, passes: None,
) -> Examined:
    """Check every parameter's and input's gradient of a target, and keep what was measured.

    PyTorch's global random state is as it was afterwards.

    Args:
        name, settings, sizes_cut: as the result says them.
        expected: told in the beginning how long one forward and backward takes, and how many this check is, about.

    Raises:
        TargetError: the target cannot be checked: it has no gradient to check, changes its inputs, returns no tensor.
    """
    start = time.perf_counter()
    with random_state_kept():
        subject = Subject(target, seed=seed)
        seen = survey(subject)
        point = _evaluated(subject)
        expected(sum(subject.pass_seconds()), PASSES_OF_LARGE if subject.n_elements > LARGE else PASSES)
        tensors, probes, verdicts = _judged(subject, seen, point)
        tensors = _looked_at_again(subject, tensors) if seen.epsilon > EPSILON else tensors
        forward_s, backward_s = subject.pass_seconds()
        estimates = estimates_of(subject, forward_s)
        tensors = told_as_estimates(tensors, estimates)
    check_s = time.perf_counter() - start
    n_elements = subject.n_elements
    failed = any(t.verdict in FAILING for t in tensors) or not all(p.holds for p in probes)
    result = GradcheckResult(
        target=name,
        settings=list(settings),
        passed=not failed,
        seed=seed,
        tensors=tensors,
        identities=[],
        probes=probes,
        estimates=estimates,
        precision=None,
        checked_count=n_elements,
        sizes_cut=list(sizes_cut),
        assumptions=seen.sentences,
        cost=Cost(
            forward_s=forward_s,
            backward_s=backward_s,
            check_s=check_s,
            passes=check_s / (forward_s + backward_s),
            forwards_count=subject.evaluations,
            finite_differences_forwards_count=2 * n_elements,
            finite_differences_s=2 * n_elements * forward_s,
        ),
    )
    return Examined(result, subject, verdicts)


def _judged(
    subject: Subject, seen: Survey, point: _Point
) -> tuple[list[TensorCheck], list[ProbeCheck], Verdicts | None]:
    if not math.isfinite(point.value):
        where = first_nonfinite(subject)
        tensors = [_unchecked(subject, name, point) for name in subject.leaves]
        return tensors, [ProbeCheck(name="finite_forward", holds=False, detail=where)], None
    if _apart(point.value, point.again, seen):
        return _nondeterministic(subject, "the same call gives another value"), [], None
    noise = estimate_noise(subject, _everywhere(subject), seen.epsilon)
    verdicts = Verdicts(subject, point.gradients, point.repeated, noise)
    tensors = verdicts.all()
    probes = probe(subject, point.gradients, noise, {tensor.name: tensor.verdict for tensor in tensors})
    if _apart(point.value, subject.value(), seen):
        return _nondeterministic(subject, "the same call gives another value later on"), probes, None
    return [_with_culprit(subject, tensor) for tensor in tensors], probes, verdicts


def _looked_at_again(subject: Subject, tensors: list[TensorCheck]) -> list[TensorCheck]:
    """What precision limits, with the target's casts raised to float64; as it is where they cannot be."""
    if not any(tensor.verdict == "precision_limited" for tensor in tensors):
        return tensors
    try:
        exact = Subject(subject.target, seed=subject.seed, within=raised_casts)
        seen, point = survey(exact), _evaluated(exact)
    except Exception:  # whatever the target raises that counts on its own precision
        return tensors
    if seen.epsilon > EPSILON or not math.isfinite(point.value) or _apart(point.value, point.again, seen):
        return tensors
    noise = estimate_noise(exact, _everywhere(exact), seen.epsilon)
    verdicts = Verdicts(exact, point.gradients, point.repeated, noise)
    return second_look(tensors, {tensor.name: tensor for tensor in verdicts.all()})


def _apart(value: float, again: float, seen: Survey) -> bool:
    return abs(value - again) > 64 * seen.epsilon * max(abs(value), abs(again))


def _everywhere(subject: Subject) -> dict[str, Tensor]:
    """A direction in which every leaf moves."""
    generator = subject.generator("noise")
    moves = {name: gaussian_like(leaf.base, generator) * leaf.scale for name, leaf in subject.leaves.items()}
    return {name: move for name, move in moves.items() if move.numel()}


def _nondeterministic(subject: Subject, detail: str) -> list[TensorCheck]:
    remedy = (
        f"{detail}: draw random numbers from torch's global generator, which is replayed, and keep nothing from call to"
        " call but in buffers"
    )
    return [record(leaf, "nondeterministic", detail=remedy) for leaf in subject.leaves.values()]


def _unchecked(subject: Subject, name: str, point: _Point) -> TensorCheck:
    leaf, grad = subject.leaves[name], point.gradients[name]
    if grad is not None and not torch.isfinite(grad).all():
        return record(leaf, "wrong", detail="its gradient is not finite, as the forward is not")
    return record(leaf, "precision_limited", detail="the forward is not finite, so there is nothing to compare with")


def _with_culprit(subject: Subject, tensor: TensorCheck) -> TensorCheck:
    """The operation of the backward that first made a NaN or an infinity, where a gradient has one."""
    if tensor.detail != NOT_FINITE:
        return tensor
    return tensor.model_copy(update={"detail": f"{NOT_FINITE}: {first_nonfinite_backward(subject)}"})


def _evaluated(subject: Subject) -> _Point:
    try:
        value, gradients = subject.gradient()
    except Exception as error:
        raise TargetError(
            f"the target's backward raised {describe(error)}", "its gradient cannot be had at all: fix it, or detach it"
        ) from error
    again, repeated = subject.gradient()
    return _Point(value, again, gradients, repeated)
