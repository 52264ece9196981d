"""Verdicts on functions whose gradient is known to be right, wrong, or something else."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_checks import checked, only, random_input
from torch import Tensor, nn

from bptool import GradientTarget
from bptool.analysis.gradcheck.check import check_gradients
from bptool.analysis.gradcheck.result import TensorCheck


class Broken(torch.autograd.Function):
    """x @ w, whose weight gradient is `change` of the true one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.change = change
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return grad @ w.mT, ctx.change(x.mT @ grad), None


product: Any = Broken.apply


def broken(change: Callable[[Tensor], Any], n_in: int = 12, n_out: int = 16, seed: int = 1) -> TensorCheck:
    """The verdict on the weight of a product whose weight gradient is changed."""
    inputs = random_input(5, n_in), random_input(n_in, n_out)
    result = checked(lambda x, w: product(x, w, change), *inputs, seed=seed)
    assert result.tensors[0].verdict == "right"
    return result.tensors[1]


class HalfDetached(nn.Module):
    """The gradient of every tensor in it is half of what it should be."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * y.detach()


class TestNames:
    def test_parameters_are_named_as_the_module_does_and_inputs_as_the_function(self) -> None:
        result = checked(nn.Linear(3, 2), random_input(4, 3))
        assert [(t.name, t.kind, t.shape) for t in result.tensors] == [
            ("weight", "parameter", [2, 3]),
            ("bias", "parameter", [2]),
            ("input", "input", [4, 3]),
        ]

    def test_inputs_without_a_name_are_numbered(self) -> None:
        result = checked(torch.mul, random_input(3), random_input(3))
        assert [t.name for t in result.tensors] == ["input[0]", "input[1]"]

    def test_nests_keywords_and_methods(self) -> None:
        def combine(batch: dict[str, Tensor], *, factor: Tensor) -> Tensor:
            return batch["a"] * factor

        inputs = {"batch": {"a": random_input(3)}, "factor": random_input(3)}
        result = check_gradients(GradientTarget(combine, inputs), seed=0)
        assert [t.name for t in result.tensors] == ["batch['a']", "factor"]
        method = checked(nn.Linear(3, 2).forward, torch.randn(4, 3))
        assert [t.name for t in method.tensors] == ["weight", "bias"]

    def test_frozen_parameters_are_not_listed_and_empty_ones_are_right(self) -> None:
        layer = nn.Linear(3, 2)
        layer.bias.requires_grad_(False)
        layer.register_parameter("none", nn.Parameter(torch.empty(0, 3)))
        result = checked(layer, torch.randn(4, 3))
        assert [(t.name, t.verdict) for t in result.tensors] == [("weight", "right"), ("none", "right")]


class TestWrong:
    def test_a_scale(self) -> None:
        found = broken(lambda grad: grad * 1.0005)
        assert (found.verdict, found.location) == ("wrong", "everywhere")
        assert found.relative_error == pytest.approx(5e-4, rel=1e-3)
        assert "1.0005 times" in found.detail

    @pytest.mark.parametrize("place", [(7, 3), (0, 0), (11, 15)])
    def test_one_element(self, place: tuple[int, int]) -> None:
        def change(grad: Tensor) -> Tensor:
            grad[place] = 0
            return grad

        assert broken(change).location == f"[{place[0]}, {place[1]}]"

    def test_one_element_of_a_large_matrix(self) -> None:
        def change(grad: Tensor) -> Tensor:
            grad[200, 17] *= 0.9
            return grad

        found = broken(change, 256, 256)
        assert (found.verdict, found.location) == ("wrong", "[200, 17]")

    def test_a_block_of_rows_and_every_other_column(self) -> None:
        def rows(grad: Tensor) -> Tensor:
            grad[4:8] *= -1
            return grad

        def columns(grad: Tensor) -> Tensor:
            grad[:, 1::2] *= 2
            return grad

        assert broken(rows).location == "[4:8, :]"
        assert broken(columns).location == "[:, 1:16:2]"
        assert broken(columns, 2, 64).location != "everywhere"

    def test_where_not_all_can_be_located_those_nearest_to_the_loss_are(self) -> None:
        layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
        result = checked(HalfDetached(layers), torch.randn(5, 64))
        assert {tensor.verdict for tensor in result.tensors} == {"wrong"}
        located = [tensor.location is not None for tensor in result.tensors]
        assert located == sorted(located)
        assert 0 < sum(located) < len(located)

    def test_nothing_where_something_should_be(self) -> None:
        for change in (torch.zeros_like, lambda grad: None):
            found = broken(change)
            assert (found.verdict, found.cut_by) == ("wrong", None)
            assert found.relative_error == pytest.approx(1)
            assert found.detectable_relative_error is not None
            assert found.detectable_relative_error < 1e-8

    def test_a_branch_that_is_detached_in_part_and_what_detaches_it(self) -> None:
        found = only(checked(lambda x: x * x.detach(), random_input(6)))
        assert (found.verdict, found.cut_by) == ("wrong", "detach")
        assert found.relative_error == pytest.approx(0.5)

    def test_a_straight_through_rounding_is_not_the_derivative(self) -> None:
        assert only(checked(lambda x: x + (x.round() - x).detach(), random_input(6))).verdict == "wrong"

    def test_where_nan_comes_from(self) -> None:
        result = checked(torch.sqrt, torch.tensor([0.0, 4.0], requires_grad=True))
        found = only(result)
        assert (found.verdict, found.location, result.passed) == ("wrong", "[0]", False)
        assert "SqrtBackward" in found.detail


class TestNotWrong:
    def test_a_right_product_and_the_smallest_error_that_would_have_been_seen(self) -> None:
        found = broken(lambda grad: grad)
        assert found.verdict == "right"
        assert found.relative_error is not None
        assert found.error_bar is not None
        assert found.detectable_relative_error is not None
        assert found.relative_error < found.error_bar < found.detectable_relative_error < 1e-8

    @pytest.mark.parametrize("points", [[0.0, 1.0, -2.0], [0.0, 0.0, 0.0]])
    @pytest.mark.parametrize("function", [torch.abs, torch.relu])
    def test_a_kink(self, function: Callable[[Tensor], Tensor], points: list[float]) -> None:
        result = checked(function, torch.tensor(points, requires_grad=True))
        assert (only(result).verdict, result.passed) == ("kink", True)

    def test_a_kink_does_not_hide_a_wrong_gradient(self) -> None:
        result = checked(lambda x: x.abs() + x * x.detach(), torch.tensor([0.0, 1.0, -2.0], requires_grad=True))
        assert only(result).verdict == "wrong"

    def test_a_key_bias_under_softmax_is_structurally_zero(self) -> None:
        class Split(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.key_bias = nn.Parameter(torch.randn(8))

            def forward(self, x: Tensor) -> Tensor:
                scores = x @ (x + self.key_bias).mT
                return scores.softmax(-1) @ x

        result = checked(Split(), torch.randn(2, 5, 8))
        assert (only(result).verdict, result.passed) == ("structurally_zero", True)

    def test_a_forward_in_float32_limits_what_can_be_said(self) -> None:
        result = checked(lambda x: (x.float() @ x.float().mT).sigmoid(), random_input(4, 4))
        assert (only(result).verdict, result.passed) == ("precision_limited", True)
        assert any("float32" in sentence for sentence in result.assumptions)

    def test_but_a_wrong_sign_is_seen_there_too(self) -> None:
        assert broken(lambda grad: -grad).verdict == "wrong"
        inputs = random_input(5, 4), random_input(4, 4)
        result = checked(lambda x, w: product(x.float(), w.float(), torch.neg), *inputs)
        assert [t.verdict for t in result.tensors][1] == "wrong"

    def test_a_padding_row_is_left_out_and_said(self) -> None:
        result = checked(nn.Embedding(7, 3, padding_idx=2), torch.tensor([0, 2, 2, 5, 0]))
        assert only(result).verdict == "right"
        assert "weight: row 2 is left out: padding_idx" in result.assumptions[0]

    def test_complex_numbers(self) -> None:
        x = torch.randn(4, 3, dtype=torch.complex64, requires_grad=True)
        assert only(checked(lambda x: torch.fft.fft(x) * x.abs(), x)).verdict == "right"

    def test_outputs_in_a_nest_and_integers_among_them(self) -> None:
        def outputs(x: Tensor) -> dict[str, Any]:
            return {"values": [x.sin(), (x.exp(), "name")], "index": x.argmax(), "shown": x.detach()}

        result = checked(outputs, random_input(5))
        assert only(result).verdict == "right"
        assert any("outputs left out" in sentence for sentence in result.assumptions)


CUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "argmax": lambda x, y: y * x.argmax(),
    "round": lambda x, y: y * x.round(),
    "floor": lambda x, y: y * (9 * x).floor(),
    "div": lambda x, y: y * torch.div(x, 0.1, rounding_mode="floor"),
    "sign": lambda x, y: y * x.sign(),
    "detach": lambda x, y: y * x.detach(),
    "detach (.data)": lambda x, y: y * x.data,
    "integer cast (long)": lambda x, y: y * (9 * x).long(),
    "integer cast (to)": lambda x, y: y * (9 * x).to(torch.int32),
    "sampling (multinomial)": lambda x, y: y[torch.multinomial(x.abs(), 3)],
    "sampling (bernoulli)": lambda x, y: y * torch.bernoulli(x.sigmoid()),
    "item": lambda x, y: y * x.sum().item(),
    "gt": lambda x, y: torch.where(x > 0, y, -y),
}


def under_no_grad(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = x * 2
    return z * y


@pytest.mark.parametrize(("cut", "function"), [*CUTS.items(), ("no_grad", under_no_grad), (None, lambda x, y: y * 1)])
def test_what_cuts_the_path(cut: str | None, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    result = checked(function, random_input(4, positive=True), random_input(4))
    first, second = result.tensors
    assert (first.verdict, first.cut_by) == ("not_connected", cut)
    assert (second.verdict, result.passed) == ("right", True)


class TestRandomness:
    def test_torchs_own_is_replayed(self) -> None:
        result = checked(lambda x: F.dropout(x, 0.4) * torch.randn(5), random_input(5))
        assert (only(result).verdict, result.passed) == ("right", True)

    def test_other_randomness_is_nondeterministic(self) -> None:
        result = checked(lambda x: x * random.random(), random_input(5))
        assert (only(result).verdict, result.passed) == ("nondeterministic", False)

    def test_so_is_a_function_that_counts_its_calls(self) -> None:
        calls = iter(range(10**6))
        assert only(checked(lambda x: x * (1.0 if next(calls) < 30 else 2.0), random_input(5))).verdict != "right"

    def test_buffers_are_put_back_before_each_call(self) -> None:
        class Counting(nn.Module):
            calls: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return x * self.calls

        assert only(checked(Counting(), random_input(5))).verdict == "right"

    def test_a_seed_repeats_everything_but_the_clock(self) -> None:
        layer, x = nn.Linear(4, 3), random_input(2, 4)
        first, second = (checked(layer, x, seed=5) for _ in range(2))
        assert first.tensors == second.tensors
        assert checked(layer, x, seed=6).tensors != first.tensors

    def test_nothing_of_the_callers_changes(self) -> None:
        layer, x = nn.BatchNorm1d(4), random_input(6, 4)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        state = torch.get_rng_state()
        assert checked(layer, x).passed
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        assert layer.weight.dtype == torch.float32
        assert layer.weight.grad is None
        assert x.grad is None


def test_a_hook_on_a_parameter_belongs_to_its_gradient() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.register_hook(lambda grad: grad * 2)
    weight, bias = checked(layer, torch.randn(4, 3)).tensors
    assert (weight.verdict, bias.verdict) == ("wrong", "right")
    assert "it is 2 times the true gradient" in weight.detail
    assert len(layer.weight._backward_hooks or {}) == 1


def test_a_gradient_that_is_forgotten_is_told_from_zeros() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: Tensor, forgets: bool) -> Tensor:
            ctx.save_for_backward(scale)
            ctx.forgets = forgets
            return x * scale

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * ctx.saved_tensors[0], None if ctx.forgets else torch.zeros_like(grad), None

    inputs = (random_input(3), random_input(3))
    for forgets, words in ((True, "the backward gives it none"), (False, "it is zero")):
        _, scale = checked(Scaled.apply, *inputs, forgets).tensors
        assert (scale.verdict, words in scale.detail) == ("wrong", True)


def test_cost_is_said_aloud() -> None:
    cost = checked(nn.Linear(30, 20), torch.randn(4, 30)).cost
    assert cost.finite_differences_forwards_count == 2 * (30 * 20 + 20)
    assert cost.finite_differences_s == pytest.approx(cost.finite_differences_forwards_count * cost.forward_s)
    assert cost.forwards_count < 200
