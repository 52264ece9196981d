"""Gradients that are estimates on purpose: how far they are from the truth, on average, and how noisy they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bptool.analysis.gradcheck.choices import Path, followed
from bptool.analysis.gradcheck.estimates import Directions, Means, directions
from bptool.analysis.gradcheck.expectation import HardSteps, Truth, enumerated, few_paths, sampled, smoothed
from bptool.analysis.gradcheck.nodes import nodes_from
from bptool.analysis.result import Record
from bptool.model.estimators import ESTIMATED_EDGES, Baseline, Watcher, watched_by
from bptool.training.seeds import derive_seed

SeededRun = Callable[[int], Tensor]
"""The function, a scalar, with PyTorch's generators seeded by the argument (`torch.default_generator.manual_seed` does
so on a CPU many times faster than `torch.manual_seed`, which calls on every device)."""

_NARROW = 0.05
"""Share of the mean at which an interval is narrow enough."""


_OTHER_SEEDS = 16
"""Under which the same choices must give the same value."""


class EstimatorCheck(Record):
    """One tensor's gradient, which is an estimate, beside the truth.

    Attributes:
        estimator: what makes it one; both names where both do.
        method: how the truth was found: `enumeration` of all paths is exact; `sampling` of paths and `smoothing` of
            hard steps have an interval; `unknown`: it was not, and `detail` says why.
        relative_bias: norm of (the estimate's mean - the truth) over the truth's.
        bias_interval: what chance alone makes of it at most, in 999 of 1000 checks; 0: nothing was drawn.
        cosine: of the angle between the estimate's mean and the truth.
        unbiased: whether the bias is within its interval, in every direction that was looked in.
        variance, variance_without_baseline: of one estimate, all elements together, over the squared norm of its mean;
            None where there is no score function.
        samples_count: estimates that were drawn.
    """

    name: str
    estimator: str
    method: Literal["enumeration", "sampling", "smoothing", "unknown"]
    relative_bias: float | None = None
    bias_interval: float | None = None
    cosine: float | None = None
    unbiased: bool | None = None
    variance: float | None = None
    variance_without_baseline: float | None = None
    samples_count: int = 0
    detail: str


def estimators_between(output: Tensor, tensor: Tensor) -> list[str]:
    """Which of bptool's estimators make a leaf's gradient an estimate; empty: none does.

    Of a score function only the way through the log probability counts: the cost's own gradient is exact.
    """
    return sorted({name for name, leaves in _estimators(output) if any(leaf is tensor for leaf in leaves)})


def check_estimators(
    run: SeededRun, tensors: Mapping[str, Tensor], *, seed: int, most_evaluations: int = 4000
) -> list[EstimatorCheck]:
    """Compare each tensor's gradient with the truth where it is an estimate; other tensors are left out.

    Args:
        run: gives the scalar; with the same seed it draws the same.
        tensors: float64 leaves that `run` reads. Their values are changed for a while; `.grad` is left alone.
        seed: of directions and of all that is drawn.
        most_evaluations: of `run` for each tensor, more or less: then intervals are as wide as they are.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        output = run(derive_seed(seed, "estimators"))
        if not _estimators(output):
            return []
        found = [(name, tensor, tuple(estimators_between(output, tensor))) for name, tensor in tensors.items()]
        cases = [_Case(name, tensor, which, run, seed, most_evaluations) for name, tensor, which in found if which]
        return [_check(case) for case in cases]


@dataclass(frozen=True)
class _Case:
    """One tensor of a function."""

    name: str
    tensor: Tensor
    which: tuple[str, ...]
    seeded: SeededRun
    seed: int
    most: int

    def run(self) -> Tensor:
        """The function under one seed, always the same."""
        return self.seeded(derive_seed(self.seed, "estimators"))

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, "estimators", purpose, self.name))

    def gradient(self, run: Callable[[], Tensor]) -> Tensor:
        (found,) = torch.autograd.grad(run(), self.tensor, allow_unused=True)
        return torch.zeros_like(self.tensor) if found is None else found.detach()


@dataclass(frozen=True)
class _Estimates:
    """The estimate's mean along each direction and its interval; the variance of one, with the baseline and without,
    over the squared norm of the mean."""

    mean: Tensor
    interval: Tensor
    variance: float | None = None
    without_baseline: float | None = None
    count: int = 0


def _check(case: _Case) -> EstimatorCheck:
    first = followed(case.run, [])
    steps = HardSteps()
    with watched_by(steps):
        case.run()
    unknown = _why_unknown(case, first, steps)
    if unknown:
        which = ", ".join(case.which)
        detail = f"an estimate ({which}), whose bias is not known: {unknown}"
        return EstimatorCheck(name=case.name, estimator=which, method="unknown", detail=detail)
    where = directions(case.tensor, case.generator("directions"))
    if not first.taken:
        truth = smoothed(case.run, where, case.generator("truth"), steps.sizes, case.most)
        mean = where.along(case.gradient(case.run))
        return _record(case, truth, _Estimates(mean, torch.zeros_like(mean)))
    paths = few_paths(case.run, case.most // (4 * len(where.units)))
    if not paths:
        return _record(
            case, sampled(case.run, where, case.generator("truth"), case.most), _drawn_estimates(case, where)
        )
    scored = "score_function" in case.which
    estimates = _drawn_estimates(case, where) if scored else _exact_estimates(case, where, paths)
    return _record(case, enumerated(case.run, where, paths), estimates)


def _why_unknown(case: _Case, first: Path, steps: HardSteps) -> str:
    """Why there is no truth to compare with; empty: there is one."""
    for number in range(_OTHER_SEEDS):
        elsewhere = followed(partial(case.seeded, derive_seed(case.seed, "noise", number)), first.taken)
        if elsewhere.taken != first.taken or not torch.equal(elsewhere.value, first.value):
            return "it draws by other means than torch.multinomial and torch.bernoulli, so its mean is not known"
    if first.taken:
        return ""
    if "score_function" in case.which:
        return "it draws nothing by torch.multinomial or torch.bernoulli, so its mean is not known"
    return "" if steps.all_known else "straight_through was given a hard value, and not the function that makes it"


def _exact_estimates(case: _Case, where: Directions, paths: Iterable[Path]) -> _Estimates:
    """The mean over all paths."""
    mean = torch.zeros(len(where.units), dtype=torch.float64)
    for path in paths:
        mean += path.probability * where.along(case.gradient(partial(_value_along, case, path)))
    return _Estimates(mean, torch.zeros_like(mean))


def _drawn_estimates(case: _Case, where: Directions) -> _Estimates:
    """Estimates as a user gets them, each under a seed of its own, until their mean's interval is narrow."""
    means, whole, without = Means(len(where.units)), Means(case.tensor.numel()), Means(case.tensor.numel())
    scored = "score_function" in case.which
    while 2 * means.count < case.most and not means.narrow(_NARROW):
        for _ in range(64):
            run = partial(case.seeded, derive_seed(case.seed, "estimate", means.count))
            gradient = case.gradient(run)
            means.add(where.along(gradient))
            whole.add(gradient.flatten())
            if scored:
                with watched_by(_NoBaseline()):
                    without.add(case.gradient(run).flatten())
    found = _Estimates(means.mean, means.interval(), count=means.count)
    if not scored:
        return found
    squared = float(whole.mean.square().sum())
    variance, plain = (_over(float(each.variance().sum()), squared) for each in (whole, without))
    return replace(found, variance=variance, without_baseline=plain)


def _value_along(case: _Case, path: Path) -> Tensor:
    return followed(case.run, path.taken).value


class _NoBaseline(Watcher):
    def baseline(self, baseline: Baseline) -> Baseline:
        return 0.0


def _record(case: _Case, truth: Truth, estimates: _Estimates) -> EstimatorCheck:
    bias, norm = estimates.mean - truth.slopes, float(truth.slopes.norm())
    allowed = (truth.interval.square() + estimates.interval.square()).sqrt()
    differences = 1e-7 * max(norm, float(estimates.mean.norm()))  # their own error is far smaller
    both = norm * float(estimates.mean.norm())
    check = EstimatorCheck(
        name=case.name,
        estimator=", ".join(case.which),
        method=truth.method,
        relative_bias=_over(float(bias.norm()), norm),
        bias_interval=_over(float(allowed.norm()), norm),
        cosine=float(estimates.mean @ truth.slopes) / both if both else None,
        unbiased=bool((bias.abs() <= allowed + differences).all()),
        variance=estimates.variance,
        variance_without_baseline=estimates.without_baseline,
        samples_count=estimates.count,
        detail="",
    )
    return check.model_copy(update={"detail": _sentence(check)})


def _sentence(check: EstimatorCheck) -> str:
    truths = {
        "enumeration": "the exact gradient of the mean over all choices",
        "sampling": "the gradient of the mean over choices, itself sampled",
        "smoothing": "the gradient of the mean with noise as large as its hard steps",
    }
    text = f"{check.estimator}: off by {check.relative_bias:.2%} on average from {truths[check.method]}"
    if check.bias_interval:
        chance = f"{check.bias_interval:.2%}"
        text += f", within the {chance} that chance allows" if check.unbiased else f" (of which {chance} may be chance)"
    text += "; unbiased as far as that shows" if check.unbiased else "; biased"
    if check.cosine is not None and not check.unbiased:
        text += f", cosine {check.cosine:.3f}"
    if check.variance is not None and check.variance_without_baseline is not None:
        text += f"; variance {check.variance:.3g} with its baseline, {check.variance_without_baseline:.3g} without"
    return text


def _estimators(output: Tensor) -> list[tuple[str, list[Tensor]]]:
    """Each estimator in the graph, and the leaves whose gradients come through its estimate."""
    found = []
    for node in nodes_from([output.grad_fn]):
        if node.name() in ESTIMATED_EDGES:
            name, edge = ESTIMATED_EDGES[node.name()]
            ends = [getattr(end, "variable", None) for end in nodes_from([node.next_functions[edge][0]])]
            found.append((name, [end for end in ends if end is not None]))
    return found


def _over(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else float("inf")
