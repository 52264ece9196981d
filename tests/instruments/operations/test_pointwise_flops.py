"""Arithmetic besides matrix products: updates by hand, the three implementations alike, and single operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from bptool.instruments.operations.recorder import OperationRecorder

SHAPES = [(7, 5), (11,)]
P = 7 * 5 + 11
N = len(SHAPES)
"""Parameters, and tensors: each has a counter of steps, which is one addition."""


def counted(run: Callable[[], Any]) -> int:
    with OperationRecorder() as recorder:
        run()
    return sum(operation.pointwise_flops for operation in recorder.trace().operations)


def update(make: Callable[[list[nn.Parameter]], Optimizer]) -> int:
    """FLOPs of a second update, as the first one makes the state."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return counted(optimizer.step)


class TestUpdates:
    """The same update has as many FLOPs, whether PyTorch runs it as a loop, on lists, or in one kernel."""

    @pytest.fixture(params=["loop", "foreach", "fused"])
    def how(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        return {"fused": request.param == "fused", "foreach": request.param == "foreach"}

    @pytest.mark.parametrize(("decay", "steps"), [(0.1, 14), (0.0, 13)])
    def test_adamw(self, how: dict[str, Any], decay: float, steps: int) -> None:
        """Decay 1; first moment 3 (lerp); second moment 1 + 3 (mul, addcmul); root, division, eps 3; update 3."""
        assert update(lambda p: AdamW(p, weight_decay=decay, **how)) == steps * P + N

    def test_adam_decays_the_gradient(self, how: dict[str, Any]) -> None:
        assert update(lambda p: Adam(p, weight_decay=0.1, **how)) == 15 * P + N

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [
            ({}, 2),
            ({"weight_decay": 0.1}, 4),
            ({"momentum": 0.9}, 4),
            ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, 8),
            ({"momentum": 0.9, "dampening": 0.5}, 5),
        ],
    )
    def test_sgd(self, how: dict[str, Any], settings: dict[str, Any], steps: int) -> None:
        """Update 2; decay 2; momentum 2, its dampening 1; Nesterov 2."""
        assert update(lambda p: SGD(p, lr=0.1, **settings, **how)) == steps * P

    def test_adagrad(self) -> None:
        assert update(lambda p: Adagrad(p, foreach=False)) == 8 * P + N
        assert update(lambda p: Adagrad(p, fused=True)) == 8 * P + N


X = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("run", "per_element"),
    [
        (lambda: X + X, 1),
        (lambda: torch.add(X, X, alpha=2), 2),
        (lambda: X.mul_(1.0), 1),
        (lambda: torch.addcmul(X, X, X), 3),
        (lambda: torch.lerp(X, X, 0.5), 3),
        (lambda: X.abs().sqrt(), 1),
        (lambda: F.silu(X), 2),
        (lambda: F.gelu(X), 5),
        (lambda: F.gelu(X, approximate="tanh"), 9),
        (lambda: X.sum(0), 1),
        (lambda: X.softmax(-1), 4),
        (lambda: F.layer_norm(X, (6,)), 6),
        (lambda: F.layer_norm(X, (6,), torch.ones(6)), 7),
        (lambda: F.layer_norm(X, (6,), torch.ones(6), torch.zeros(6)), 8),
        (lambda: X.clone(), 0),
        (lambda: X.t().contiguous(), 0),
        (lambda: X > 0, 0),
        (lambda: F.relu(X), 0),
        (lambda: X.double(), 0),
        (lambda: X[torch.tensor([0, 1])], 0),
        (lambda: torch._foreach_mul([X, X], 2.0), 2),
        (lambda: torch._foreach_norm([X]), 2),
    ],
)
def test_steps_for_each_element(run: Callable[[], Any], per_element: int) -> None:
    without_inputs = counted(run)
    assert without_inputs == per_element * X.numel()


def test_a_product_has_none_of_its_own() -> None:
    assert counted(lambda: X @ torch.ones(6, 3)) == 0


def test_additions_into_a_target_are_the_sources() -> None:
    target = torch.zeros(100, 6)
    index = torch.tensor([3, 3, 4, 5])

    def add() -> Tensor:
        return target.index_add_(0, index, X)

    assert counted(add) == X.numel()
    assert counted(lambda: target.index_put_((index,), X, accumulate=True)) == X.numel()
    assert counted(lambda: target.index_put_((index,), X)) == 0
