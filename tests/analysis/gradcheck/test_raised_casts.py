"""A forward in a lower precision is looked at again with its casts raised to float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_checks import checked
from torch import Tensor, nn

from bptool.analysis.gradcheck.raised_casts import raised_casts
from bptool.analysis.gradcheck.result import TensorCheck

RAISED = "right with its casts raised to float64"
LOWER = "lower precision than float64"


def only(function: Callable[..., Any], *inputs: Any) -> TensorCheck:
    (tensor,) = checked(function, *inputs).tensors
    return tensor


def some() -> Tensor:
    return torch.randn(6, 5, requires_grad=True)


class Cube(torch.autograd.Function):
    """x^3, whose backward is off by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 3 * ctx.saved_tensors[0] ** 2 * ctx.factor, None


class InFloat32(torch.autograd.Function):
    """sin, computed in float32 there and back, as a kernel has it that knows nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.float().sin().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad.float() * ctx.saved_tensors[0].float().cos()).double()


def cubed(x: Tensor, factor: float) -> Tensor:
    cube: Tensor = Cube.apply(x, factor)  # type: ignore[no-untyped-call]
    return cube.float().sin()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.float().softmax(-1),
        lambda x: F.softmax(x, -1, dtype=torch.float32),
        lambda x: (x.to(torch.bfloat16) * 3).exp().to(x.dtype),
        lambda x: x.half() @ torch.linspace(0, 1, 5, dtype=torch.float16),
        lambda x: (x.float() * 5).softmax(-1) @ torch.linspace(0, 1, 5),
    ],
    ids=["float()", "dtype=", "to()", "half() and dtype=", "the default dtype"],
)
def test_what_is_right_is_said_to_be(function: Callable[[Tensor], Tensor]) -> None:
    """The verdict stays: the target computes in a lower precision, and its differences are coarse."""
    tensor = only(function, some())
    assert tensor.verdict == "precision_limited"
    assert tensor.detail.startswith(RAISED)
    assert float(tensor.detail.split(" from ")[1].split()[0]) < 1e-8


def test_an_error_that_float32_hides_is_found() -> None:
    x = some()
    assert only(lambda x: cubed(x, 1.0), x).verdict == "precision_limited"
    tensor = only(lambda x: cubed(x, 1 + 1e-5), x)
    assert (tensor.verdict, tensor.location) == ("wrong", "everywhere")
    assert tensor.relative_error == pytest.approx(1e-5, rel=1e-2)
    assert "with its casts raised to float64; it is 1.00001 times" in tensor.detail


def test_a_function_that_has_its_own_backward_is_not_changed() -> None:
    """Its backward rounds to float32 all the same, which in a forward of float64 would be an error."""
    tensor = only(InFloat32.apply, some())
    assert tensor.verdict == "precision_limited"
    assert tensor.detail.endswith(LOWER)


def test_a_target_that_counts_on_its_precision_is_as_it_is() -> None:
    constant = torch.randn(5, 4)
    tensor = only(lambda x: (x.float() * 5).softmax(-1) @ constant, some())
    assert tensor.verdict == "precision_limited"
    assert tensor.detail.endswith(LOWER)


def test_where_the_precision_falls_is_said() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float32) / 3

    (sentence,) = checked(nn.Sequential(nn.Linear(5, 3), Norm()), torch.randn(4, 5)).assumptions
    assert sentence == "the forward computes in float32 from Tensor.to in 1 on, so the differences are coarse"


def test_nothing_is_raised_afterwards() -> None:
    with raised_casts():
        assert torch.ones(2).half().dtype == torch.zeros(2).dtype == torch.float64
        assert torch.ones(2).long().dtype == torch.int64
    assert torch.zeros(2).half().dtype == torch.float16
