"""What is asked about a target beside its gradient: identities, another number format, known bugs. Each is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bptool.analysis.gradcheck.check import Examined
from bptool.analysis.gradcheck.identities.check import check_identities, observed_identities
from bptool.analysis.gradcheck.identities.identity import Identities
from bptool.analysis.gradcheck.mutation.catching import Eye
from bptool.analysis.gradcheck.mutation.check import mutations
from bptool.analysis.gradcheck.precision import check_precision
from bptool.analysis.gradcheck.random_state import random_state_kept
from bptool.analysis.gradcheck.result import FAILING, GradcheckResult
from bptool.analysis.gradcheck.subject import Subject
from bptool.config.schema import Config
from bptool.training.gradient_target import GradientTarget
from bptool.training.workload import Workload


@dataclass(frozen=True)
class Trained:
    """A workload, and how it is trained.

    Attributes:
        config: of sizes that float64 can afford.
        built_in: whether it is the built-in transformer, whose parts are known.
    """

    config: Config
    workload: Workload
    built_in: bool
    device: torch.device


def with_identities(result: GradcheckResult, checked: Trained | GradientTarget) -> GradcheckResult:
    """The identities of backpropagation: of a training step, or of PyTorch's own functions in what has none."""
    with _timed() as spent:
        if isinstance(checked, GradientTarget):
            found = _observed(checked, result.seed)
        else:
            found = check_identities(
                checked.config, checked.workload, built_in=checked.built_in, seed=result.seed, device=checked.device
            )
    changed = result.model_copy(
        update={
            "identities": found.identities,
            "assumptions": [*result.assumptions, *found.left_out],
            "passed": result.passed and all(identity.holds for identity in found.identities),
        }
    )
    return _with_time(changed, "identities_s", spent())


def with_precision(result: GradcheckResult, checked: Trained, mode: str) -> GradcheckResult:
    """Each gradient in another format."""
    with _timed() as spent:
        found = check_precision(
            checked.config,
            checked.workload,
            mode,
            built_in=checked.built_in,
            seed=result.seed,
            device=checked.device,
        )
    return _with_time(result.model_copy(update={"precision": found}), "precision_s", spent())


def with_mutations(
    result: GradcheckResult, examined: Examined, progress: Callable[[int, int], None]
) -> GradcheckResult:
    """Known bugs in the target's backward; beside a gradient that is wrong already none could be told."""
    verdicts = examined.verdicts
    reason = ""
    if verdicts is None:
        reason = "nothing could be measured"
    elif any(tensor.verdict in FAILING for tensor in result.tensors):
        reason = "the gradient is not right without them"
    elif not verdicts.looks:
        reason = "nothing could be measured that they would change"
    if verdicts is None or reason:
        sentence = f"mutations: none was made, as {reason}"
        return result.model_copy(update={"mutations": [], "assumptions": [*result.assumptions, sentence]})
    detectable = {tensor.name: tensor.detectable_relative_error for tensor in result.tensors}
    with _timed() as spent, random_state_kept():
        found = mutations(examined.subject, Eye(verdicts.directions, verdicts.looks, detectable), progress)
    return _with_time(result.model_copy(update={"mutations": found}), "mutations_s", spent())


def _observed(target: GradientTarget, seed: int) -> Identities:
    with random_state_kept():
        subject = Subject(target, seed=seed)
        if not any(output.requires_grad for output in subject.outputs()):
            return Identities(identities=[], left_out=[])
        observed = observed_identities(lambda: subject.scalar(subject.outputs()))
    return Identities(identities=observed, left_out=[])


def _with_time(result: GradcheckResult, part: str, seconds: float) -> GradcheckResult:
    cost = result.cost
    check_s = cost.check_s + seconds
    passes = check_s / (cost.forward_s + cost.backward_s)
    changed = cost.model_copy(update={part: seconds, "check_s": check_s, "passes": passes})
    return result.model_copy(update={"cost": changed})


@contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    """Gives what says how many seconds the block took, once it is left."""
    start, end = time.perf_counter(), list[float]()
    try:
        yield lambda: end[0] - start
    finally:
        end.append(time.perf_counter())
