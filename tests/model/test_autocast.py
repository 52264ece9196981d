"""One 16-bit copy for several products, against autocast's own copy for each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_runs import small_config
from torch import Tensor

from bptool.analysis.memory.simulation import STEADY, simulate
from bptool.model.autocast import cast_once
from bptool.training.workload import transformer_workload

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def outputs_and_gradients(uses: int, dtype: torch.dtype, *, shared: bool) -> list[Tensor]:
    torch.manual_seed(uses)
    x = torch.randn(33, 17, requires_grad=True)
    weights = [torch.randn(9, 17, requires_grad=True) for _ in range(uses)]
    scales = [2.0 ** (9 * i % 22) for i in range(uses)]  # so far apart that the order of a sum shows
    slopes = [(scale * torch.randn(33, 9) / 512).to(dtype) for scale in scales]
    middle = x * 1  # autocast's cache is for leaves alone
    with torch.autocast("cpu", dtype):
        inputs = cast_once(middle, uses) if shared else (middle,) * uses
        results = [F.linear(one, weight) for one, weight in zip(inputs, weights, strict=True)]
    torch.autograd.backward(results, slopes)
    return [*results, *(leaf.grad for leaf in (x, *weights) if leaf.grad is not None)]


@LOW
@pytest.mark.parametrize("uses", [1, 2, 3, 5])
def test_values_and_gradients_are_autocasts_to_the_bit(uses: int, dtype: torch.dtype) -> None:
    ours, own = (outputs_and_gradients(uses, dtype, shared=shared) for shared in (True, False))
    assert len(ours) == 2 * uses + 1
    assert all(torch.equal(left, right) for left, right in zip(ours, own, strict=True))


@LOW
def test_there_is_one_copy(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        casts = cast_once(torch.randn(4, 3), 3)
    assert {one.dtype for one in casts} == {dtype}
    assert len({one.untyped_storage().data_ptr() for one in casts}) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_autocast_leaves_alone_is_itself(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(one is x for one in cast_once(x, 3))
    assert all(one is x for one in cast_once(x, 3))


def test_a_gradient_of_the_gradient() -> None:
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        left, right = cast_once(x, 2)
        product = (left * right).float().sum()
    (slope,) = torch.autograd.grad(product, x, create_graph=True)
    assert torch.equal(slope, 2 * x)
    (second,) = torch.autograd.grad(slope.sum(), x)
    assert torch.equal(second, torch.full_like(x, 2))


def copies_of_weights(policy: str) -> int:
    """16-bit copies of the blocks' matrices that are held when a forward has come to its loss."""
    config = small_config({"precision.mode": "bf16-mixed", "activation_checkpoint.policy": policy})
    trace = simulate(config, transformer_workload(config))
    in_loss = [e for e in trace.events_of(STEADY, "forward").tolist() if trace.events[e].module == "loss"]
    held = trace.live_at(in_loss[0])
    return sum(a.op == "aten._to_copy" and "blocks." in a.module and a.tensor.count(",") == 1 for a in held)


def test_a_recomputed_forward_keeps_no_copies_of_weights() -> None:
    assert copies_of_weights("none") == 2 * 7  # two blocks of seven matrices
    assert copies_of_weights("full") == 0
