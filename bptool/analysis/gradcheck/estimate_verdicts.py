"""Gradients that are estimates on purpose, as verdicts: finite differences of one draw say nothing about them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bptool.analysis.gradcheck.estimators import EstimatorCheck, check_estimators
from bptool.analysis.gradcheck.result import TensorCheck
from bptool.analysis.gradcheck.subject import Subject

_SECONDS = 60.0
"""For all estimates of a target together, more or less."""
_FEWEST, _MOST = 256, 4000


def estimates_of(subject: Subject, forward_s: float) -> list[EstimatorCheck]:
    """Each leaf's estimate beside the truth; empty where the function has none.

    Args:
        forward_s: what one evaluation takes, which says how many can be afforded.
    """
    before = subject.random_seed

    def run(seed: int) -> Tensor:
        subject.random_seed = seed
        return subject.scalar(subject.outputs())

    leaves = {name: leaf.tensor for name, leaf in subject.leaves.items()}
    affordable = int(_SECONDS / (len(leaves) * max(forward_s, 1e-4)))
    try:
        return check_estimators(run, leaves, seed=subject.seed, most_evaluations=min(max(affordable, _FEWEST), _MOST))
    finally:
        subject.random_seed = before


def told_as_estimates(tensors: Sequence[TensorCheck], estimates: Sequence[EstimatorCheck]) -> list[TensorCheck]:
    """The tensors, those whose gradients are estimates with that verdict and their bias."""
    found = {estimate.name: estimate for estimate in estimates}
    return [_told(tensor, found[tensor.name]) if tensor.name in found else tensor for tensor in tensors]


def _told(tensor: TensorCheck, estimate: EstimatorCheck) -> TensorCheck:
    return tensor.model_copy(
        update={
            "verdict": "estimator",
            "relative_error": estimate.relative_bias,
            "error_bar": estimate.bias_interval,
            "detectable_relative_error": None,
            "location": None,
            "cut_by": None,
            "detail": estimate.detail,
        }
    )
