"""The smallest error that a run says it would have caught: it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bptool import GradientTarget
from bptool.analysis.gradcheck.check import check_gradients
from bptool.analysis.gradcheck.directions import MISSED, Measured, detectable
from bptool.analysis.gradcheck.result import TensorCheck


class OffBy(torch.autograd.Function):
    """tanh(x @ w), whose weight gradient has an error added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, kind: str, size: float) -> Tensor:
        y = (x @ w).tanh()
        ctx.save_for_backward(x, w, y)
        ctx.kind, ctx.size = kind, size
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, y = ctx.saved_tensors
        slope = grad * (1 - y.square())
        right = x.mT @ slope
        return slope @ w.mT, right + ctx.size * right.norm() * unit_error(ctx.kind, right), None, None


def unit_error(kind: str, grad: Tensor) -> Tensor:
    """An error with norm 1."""
    error = torch.zeros_like(grad)
    match kind:
        case "a factor":
            error = grad.clone()
        case "one element":
            error[-1, 2] = 1
        case "one row":
            error[3] = 1
        case "anything":
            error = torch.randn(grad.shape, generator=torch.Generator().manual_seed(9), dtype=grad.dtype)
    found: Tensor = error / error.norm()
    return found


KINDS = ("a factor", "one element", "one row", "anything")


def verdict(kind: str, size: float, seed: int, shape: Sequence[int]) -> TensorCheck:
    generator = torch.Generator().manual_seed(seed)
    x, w = (
        torch.randn(n, m, generator=generator, dtype=torch.float64) / math.sqrt(n) for n, m in ((5, shape[0]), shape)
    )
    off_by: Any = OffBy.apply
    target = GradientTarget(lambda w: off_by(x, w, kind, size), (w.requires_grad_(),))
    (found,) = check_gradients(target, seed=seed).tensors
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_just_above_is_caught_and_one_far_below_is_not_claimed(kind: str) -> None:
    caught = 0
    for seed in range(6):
        smallest = verdict(kind, 0.0, seed, (8, 6)).detectable_relative_error
        assert smallest is not None
        caught += verdict(kind, 1.05 * smallest, seed, (8, 6)).verdict == "wrong"
        assert verdict(kind, 0.02 * smallest, seed, (8, 6)).verdict == "right"
    assert caught == 6  # each is missed with a probability of a hundredth at most, and these seeds are fixed


def test_the_definition() -> None:
    """One direction: missed where |N(0, 1)| is below 2 bar / (ratio norm), which happens with a probability of 1%."""
    one = Measured(by_differences=1.0, by_backward=1.0, error_bar=1e-9, jump=0.0)
    ratio = detectable([one], norm=2.0)
    assert math.erf(2 * 1e-9 / (ratio * 2.0) / math.sqrt(2)) == pytest.approx(MISSED, rel=1e-6)
    assert detectable([one] * 4, norm=2.0) < ratio / 20  # with four directions all of them have to miss it


def test_without_a_gradient_or_a_slope_nothing_is_claimed() -> None:
    blind = Measured(by_differences=math.nan, by_backward=1.0, error_bar=math.inf, jump=0.0)
    assert detectable([blind], norm=1.0) == math.inf
    assert detectable([Measured(0.0, 0.0, 1e-9, 0.0)], norm=0.0) == math.inf
