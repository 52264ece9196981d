from __future__ import annotations

from typing import Any

import pytest
import torch
from small_runs import small_config, transformer_step
from torch import Tensor, nn

from bptool.instruments.first_nonfinite import FirstNonFinite


class BadForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class BreakGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


class BadBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = BreakGradient.apply(x)  # type: ignore[no-untyped-call]
        return result


class Residual(nn.Module):
    """Adds two branches of itself, as a transformer's block does."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.left(x) + self.right(x)
        return result


def finding(model: nn.Module, x: Tensor | None = None) -> str | None:
    watcher = FirstNonFinite(model)
    with watcher.watch():
        model(torch.ones(3, 4) if x is None else x).square().mean().backward()
    return watcher.finding


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def test_all_is_finite() -> None:
    assert finding(nn.Sequential(linear(), nn.Tanh(), linear())) is None


class TestForward:
    def test_the_innermost_module(self) -> None:
        model = nn.Sequential(linear(), nn.Sequential(linear(), BadForward()), linear())
        assert finding(model) == "the output of 1.1 (BadForward)"

    def test_the_first_of_several(self) -> None:
        assert finding(nn.Sequential(linear(), BadForward(), BadForward())) == "the output of 1 (BadForward)"

    def test_what_the_model_does_itself(self) -> None:
        model = Residual(linear(), linear())
        assert finding(model, torch.full((3, 4), torch.inf)) == "the output of left (Linear)"
        big = torch.full((3, 4), 3e38)  # finite branches, whose sum is not
        model.left, model.right = nn.Identity(), nn.Identity()
        assert finding(model, big.requires_grad_()) == "the output of the model (Residual)"

    def test_the_built_in_model(self) -> None:
        step = transformer_step(small_config())
        with torch.no_grad():
            step.model.get_parameter("blocks.1.feed_forward.up.weight").fill_(1e20)
            step.model.get_parameter("blocks.1.feed_forward.down.weight").fill_(3e38)
        watcher = FirstNonFinite(step.model)
        with watcher.watch():
            step.accumulate([step.workload.batch(torch.Generator())], [1])
        assert watcher.finding == "the output of blocks.1.feed_forward.down (Linear)"


class TestBackward:
    def test_the_module_whose_backward_made_it(self) -> None:
        model = nn.Sequential(linear(), BadBackward(), linear())
        assert finding(model) == "the backward of 1 (BadBackward), in BreakGradientBackward"

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_among_modules_that_share_their_input(self, side: str) -> None:
        branches = {"left": linear(), "right": linear(), side: BadBackward()}
        model = nn.Sequential(linear(), Residual(**branches), linear())
        assert finding(model) == f"the backward of 1.{side} (BadBackward), in BreakGradientBackward"

    @pytest.mark.parametrize("inner_first", [True, False])
    def test_what_a_container_does_itself(self, inner_first: bool) -> None:
        class Root(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = linear()

            def forward(self, x: Tensor) -> Tensor:
                return self.root(self.inner(x)) + 1 if inner_first else self.inner(self.root(x)) + 1

            def root(self, x: Tensor) -> Tensor:
                return (x * 0).sqrt()  # whose slope at 0 is infinite

        assert finding(nn.Sequential(linear(), Root(), linear())) == "the backward of 1 (Root), in SqrtBackward0"

    def test_what_the_loss_did(self) -> None:
        model = nn.Sequential(linear())
        watcher = FirstNonFinite(model)
        with watcher.watch():
            (model(torch.ones(3, 4)).sum() * 0).sqrt().backward()
        assert watcher.finding == "the gradient that reaches 0 (Linear)"

    def test_a_sum_over_micro_batches(self) -> None:
        """Each gradient is finite, and what they add up to is not."""
        model = nn.Linear(1, 1, bias=False)
        watcher = FirstNonFinite(model)
        with watcher.watch():
            for _ in range(2):
                (model(torch.ones(1, 1)) * 2e38).sum().backward()
        assert watcher.finding == "the sum of the gradients of weight"

    def test_under_activation_checkpointing(self) -> None:
        step = transformer_step(small_config({"activation_checkpoint.policy": "full"}))
        step.model.get_submodule("blocks.0").register_module("dropout", BadBackward())
        watcher = FirstNonFinite(step.model)
        with watcher.watch():
            step.accumulate([step.workload.batch(torch.Generator())], [1])
        assert watcher.finding == "the backward of blocks.0.dropout (BadBackward), in BreakGradientBackward"


def test_a_weight_comes_first() -> None:
    model = nn.Sequential(linear(), BadForward())
    with torch.no_grad():
        model[0].bias[2] = torch.nan  # type: ignore[operator]
    assert finding(model) == "the weight 0.bias, before the step"


def test_a_frozen_part_is_watched_too() -> None:
    model = nn.Sequential(linear().requires_grad_(False), BadForward(), linear())
    assert finding(model) == "the output of 1 (BadForward)"


def test_nothing_is_left_on_the_model() -> None:
    model = nn.Sequential(linear(), nn.Tanh())
    with FirstNonFinite(model).watch():
        pass
    watcher = FirstNonFinite(model)
    with watcher.watch():
        pass
    model(torch.full((3, 4), torch.inf)).sum().backward()
    assert watcher.finding is None
