"""For each probe an operation that it alone finds out: its numbers are right at the point that is checked."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from gradient_checks import checked
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bptool.analysis.gradcheck.result import GradcheckResult


def failing(result: GradcheckResult) -> set[str]:
    return {probe.name for probe in result.probes if not probe.holds}


def detail(result: GradcheckResult, name: str) -> str:
    return next(probe.detail for probe in result.probes if probe.name == name)


def as_it_lies(tensor: Tensor) -> Tensor:
    """The numbers in memory order, as a kernel sees them that is given a bare pointer."""
    size = tensor.untyped_storage().size() // tensor.element_size()
    flat = tensor.as_strided((size,), (1,), 0)
    return torch.cat([flat, flat.new_zeros(tensor.numel())])[: tensor.numel()]  # beyond the storage lies anything


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()


class PointerInBackward(Sine):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return as_it_lies(grad).view(x.shape) * x.cos()


class ViewInBackward(Sine):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad.view(-1).view(x.shape) * x.cos()


class PointerToInput(Sine):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * as_it_lies(x).view(x.shape).cos()


class Remembering(torch.autograd.Function):
    """Keeps what it needs where the next call puts its own."""

    kept: Any = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Remembering.kept = x.detach().clone()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * Remembering.kept.cos()


class Consuming(torch.autograd.Function):
    """Changes in its backward what it saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach().clone()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.kept.cos_()


class LastOfRepeated(torch.autograd.Function):
    """Rows by index; of indices that come twice, the last alone is counted."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(table, ids)
        return table[ids]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        table, ids = ctx.saved_tensors
        found = torch.zeros_like(table)
        found[ids] = grad
        return found, None


class Writing(Sine):
    """Puts the gradient where autograd adds it up, instead of adding to what is there."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if x.grad is not None:
            x.grad.zero_()
        return grad * x.cos()


class InPlace(Sine):
    """Works on the gradient that comes in, which others may hold."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad.mul_(x.cos())


class ForwardOfAnother(torch.autograd.Function):
    """Its backward is right, and its `jvp` is another function's."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return tangent * ctx.saved_tensors[0].sin()


class NotFinite(Sine):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = grad * ctx.saved_tensors[0].cos()
        found[0, 0] = torch.nan
        return found


class Another(Sine):
    """Another gradient at each run."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved_tensors[0].cos() * (1 + next(COUNTER))


COUNTER = count()


class ConstantInDouble(torch.autograd.Function):
    """exp, whose saved result was made without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.kept = y
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.kept


class Once(Sine):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


def some() -> Tensor:
    return torch.randn(4, 3, requires_grad=True)


def called(function: Any) -> Callable[..., Any]:
    """`apply`, typed."""
    apply: Callable[..., Any] = function.apply
    return apply


@pytest.mark.parametrize(
    ("function", "probes"),
    [
        (PointerInBackward, {"noncontiguous_gradient", "expanded_gradient"}),
        (ViewInBackward, {"noncontiguous_gradient"}),
        (PointerToInput, {"noncontiguous_inputs", "expanded_inputs"}),
        (Remembering, {"second_call"}),
        (Consuming, {"second_call"}),
        (Writing, {"accumulation"}),
        (InPlace, {"unchanged_gradient"}),
        (ForwardOfAnother, {"forward_mode"}),
    ],
)
def test_it_is_found_out(function: Any, probes: set[str]) -> None:
    result = checked(called(function), some())
    assert probes <= failing(result)
    assert not result.passed
    assert result.failures()[-1].startswith("probe ")
    if function is not Consuming:  # its second backward is asked for by more than one probe
        assert {t.verdict for t in result.tensors} == {"right"}


@pytest.mark.parametrize(("function", "verdict"), [(NotFinite, "wrong"), (Another, "nondeterministic")])
def test_what_is_wrong_everywhere_is_told_once(function: Any, verdict: str) -> None:
    """The verdict says it; no probe repeats it as its own finding."""
    result = checked(called(function), some())
    assert [tensor.verdict for tensor in result.tensors] == [verdict]
    assert failing(result) == set()


def test_forward_mode_beside_the_backward() -> None:
    class Right(ForwardOfAnother):
        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Any:
            return tangent * ctx.saved_tensors[0].cos()

    class Refusing(ForwardOfAnother):
        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Any:
            raise NotImplementedError("not yet")

    assert detail(checked(called(Right), some()), "forward_mode") == "the same slope along a direction"
    assert detail(checked(called(Refusing), some()), "forward_mode") == "not offered: not yet"
    assert "nothing to ask" in detail(checked(called(Once), some()), "forward_mode")


def test_repeated_indices() -> None:
    table = torch.randn(6, 3, requires_grad=True)
    result = checked(called(LastOfRepeated), table, torch.tensor([0, 3, 1, 5]))
    assert {t.verdict for t in result.tensors} == {"right"}
    assert failing(result) == {"zero_indices", "repeated_indices"}


def test_where_repeated_indices_have_no_defined_result_nothing_is_asked() -> None:
    result = checked(lambda x, i, s: x.scatter(0, i, s), some(), torch.tensor([[0, 1, 2]]), torch.randn(1, 3))
    assert result.passed
    assert "scatter defines no result" in detail(result, "zero_indices")


def test_double_backward_where_it_is_claimed() -> None:
    assert failing(checked(called(ConstantInDouble), some(), double_backward=True)) == {"double_backward"}
    told = checked(called(ConstantInDouble), some())
    assert told.passed
    assert "not claimed" in detail(told, "double_backward")
    assert checked(torch.exp, some(), double_backward=True).passed


def test_double_backward_that_is_refused() -> None:
    told = checked(called(Once), some())
    assert told.passed
    assert "not offered" in detail(told, "double_backward")
    assert failing(checked(called(Once), some(), double_backward=True)) == {"double_backward"}


def test_double_backward_where_all_is_empty() -> None:
    """PyTorch 2.11 refuses to differentiate by nothing."""
    result = checked(torch.sin, torch.zeros(0, requires_grad=True))
    assert result.passed
    assert "no element has a gradient" in detail(result, "double_backward")


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Linear(3, 2), (some(),)),
        (nn.Embedding(5, 3), (torch.tensor([[0, 1, 1], [4, 4, 2]]),)),
        (nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.GELU()), (some(),)),
        (nn.GRU(3, 4, batch_first=True), (torch.randn(2, 5, 3, requires_grad=True),)),
    ],
    ids=["linear", "embedding", "dropout and batch norm", "gru"],
)
def test_all_hold_for_pytorchs_own(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    result = checked(module, *inputs)
    assert failing(result) == set()
    assert result.passed


def test_every_probe_is_named_once() -> None:
    names = [probe.name for probe in checked(torch.sin, some()).probes]
    assert len(names) == len(set(names)) == 12
