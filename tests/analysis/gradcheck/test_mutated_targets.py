"""Bugs put into targets of all sorts: that refuse, that are wrong already, or in which a bug shows nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_checks import eye
from torch import Tensor, nn

from bptool import GradientTarget
from bptool.analysis.gradcheck.check import examine
from bptool.analysis.gradcheck.further import with_mutations
from bptool.analysis.gradcheck.result import GradcheckResult


def mutated(function: Any, *inputs: Any) -> GradcheckResult:
    examined = examine(GradientTarget(function, inputs), seed=1)
    return with_mutations(examined.result, examined, lambda done, of: None)


class TestOtherTargets:
    def test_what_applies_nowhere_is_told(self) -> None:
        result = mutated(torch.sin, torch.randn(1, requires_grad=True))
        outcomes = {one.name: one for one in result.mutations or ()}
        assert outcomes["wrong sign"].outcome == "caught"
        assert (outcomes["transposed"].outcome, outcomes["transposed"].op) == ("not_applicable", "")
        assert outcomes["mask off by one"].detail == "scaled_dot_product_attention is not called"

    def test_a_bug_that_changes_nothing_is_told(self) -> None:
        """The incoming gradient is a matrix that equals its transpose."""
        weights = torch.ones(4, 4, dtype=torch.float64)
        result = mutated(lambda x: (x * weights).sum(), torch.randn(4, 4, requires_grad=True))
        (transposed,) = (one for one in result.mutations or () if one.name == "transposed")
        assert transposed.outcome == "no_effect"

    def test_beside_a_wrong_gradient_none_is_made(self) -> None:
        result = mutated(lambda x: x * x.detach(), torch.randn(4, requires_grad=True))
        assert result.mutations == []
        assert result.assumptions[-1] == "mutations: none was made, as the gradient is not right without them"

    def test_where_nothing_was_measured_none_is_made(self) -> None:
        result = mutated(lambda x: x.log(), torch.full((3,), -1.0, requires_grad=True))
        assert result.mutations == []
        assert result.assumptions[-1] == "mutations: none was made, as nothing could be measured"

    def test_an_error_in_a_small_gradient_is_no_rounding(self) -> None:
        """It is missed, and not taken for a bug without effect."""
        a, b = (torch.randn(9, requires_grad=True) for _ in range(2))
        target = GradientTarget(lambda a, b: a.sin() + 1e-5 * b.sin(), (a, b))
        examined = examine(target, seed=3)
        _, right = examined.subject.gradient()
        small = right["b"]
        assert small is not None
        caught = eye(examined).sees({**right, "b": small * (1 + 1e-9)})
        assert caught.changed == ("b",)
        assert caught.relative_error == pytest.approx(1e-9, rel=1e-3)

    def test_a_backward_that_refuses(self) -> None:
        class Careful(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                if not torch.isfinite(grad).all():
                    raise ValueError("not finite, and told so")
                return grad

        def function(x: Tensor) -> Tensor:
            return Careful.apply(x).sin()  # type: ignore[no-untyped-call, no-any-return]

        result = mutated(function, torch.randn(3, requires_grad=True))
        (nan,) = (one for one in result.mutations or () if one.name == "one element NaN")
        assert nan.outcome == "caught"
        if nan.op.startswith("Sin"):
            assert "refuses it: not finite, and told so" in nan.detail

    def test_functions_in_place_are_let_be(self) -> None:
        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
        result = mutated(module, torch.randn(6, 4))
        assert result.passed
        assert {one.outcome for one in result.mutations or ()} <= {"caught", "not_applicable", "no_effect"}

    def test_a_key_bias_that_has_no_gradient(self) -> None:
        """An error in what is zero by structure has no relative size, and is caught."""
        x = torch.randn(5, 4)
        bias = torch.zeros(1, requires_grad=True)
        weight = torch.randn(4, requires_grad=True)

        def function(weight: Tensor, bias: Tensor) -> Tensor:
            return (x.double() @ weight + bias).softmax(0)

        examined = examine(GradientTarget(function, (weight, bias)), seed=0)
        _, right = examined.subject.gradient()
        caught = eye(examined).sees({**right, "bias": torch.full((1,), 0.1, dtype=torch.float64)})
        assert (caught.seen, caught.relative_error) == (True, None)
