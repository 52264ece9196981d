"""Offloading on a CPU that takes itself for a GPU: copies are made, each once, and the gradient is the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import random_batches, same_bits, small_config, transformer_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bptool.hardware import standing_in_for_cuda_tensors
from bptool.training.offload import TO_HOST, offloading


class Copies(TorchDispatchMode):
    """Sizes of what goes to host memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is TO_HOST:
            self.shapes[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


class Twice(nn.Module):
    """x sin(x W) cos(x V), which saves x three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(64, 48, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x).sin() * self.second(x).cos() * x[:, :48]
        return y


def test_each_tensor_goes_once_and_weights_stay() -> None:
    """Saved: x for both products, both products' results for sin and cos, what `*` multiplies; the slice is a view."""
    module, x = Twice(), torch.randn(32, 64, requires_grad=True)
    copies = Copies()
    with standing_in_for_cuda_tensors(), copies:
        offloading(module, module.forward)(x).sum().backward()
    assert copies.shapes == {(32, 64): 1, (32, 48): 6}


def test_on_a_cpu_nothing_moves() -> None:
    copies = Copies()
    module, x = Twice(), torch.randn(32, 64, requires_grad=True)
    with copies:
        offloading(module, module.forward)(x).sum().backward()
    assert not copies.shapes


def test_a_tensor_that_is_written_over_goes_again() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        first = y.sin()
        with torch.no_grad():
            y = y.add_(1)
        return first + F.relu(y * 1.0) * y

    copies = Copies()
    x = torch.randn(32, 64, requires_grad=True)
    with standing_in_for_cuda_tensors(), copies:
        offloading(nn.Identity(), forward)(x)
    assert copies.shapes == {(32, 64): 3}  # y before and after, and what relu returns


@pytest.mark.parametrize(
    "changes",
    [{}, {"model.attention": "eager"}, {"model.norm": "layernorm", "model.bias": True}, {"model.mla.kv_rank": 8}],
)
def test_the_gradient_is_the_same_to_the_bit(changes: dict[str, Any]) -> None:
    shape = {"model.d_model": 32, "model.context_length": 64, "training.micro_batch_size": 4, "model.dropout": 0.2}

    def gradient(policy: str) -> dict[str, Tensor]:
        step = transformer_step(small_config({**shape, **changes, "activation_checkpoint.policy": policy}))
        torch.manual_seed(5)
        step.accumulate(random_batches(step, 1, 2), [1, 1])
        return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}

    copies = Copies()
    with standing_in_for_cuda_tensors(), copies:
        plain = gradient("none")
        assert not copies.shapes
        assert same_bits(gradient("offload"), plain)
    assert copies.shapes.total() > 20
