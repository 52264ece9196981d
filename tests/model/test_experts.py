"""A mixture of experts against the same written token by token, and what its balancing does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bptool.config.schema import ModelSettings
from bptool.model.experts import MixtureOfExperts, imbalance
from bptool.model.feed_forward import FeedForward
from bptool.model.grouped import grouped_linear


def settings(activation: str = "swiglu", **moe: Any) -> ModelSettings:
    keys = {"n_experts": 6, "d_expert": 5, "n_active": 2, **moe}
    return ModelSettings.model_validate({"d_model": 8, "n_heads": 2, "activation": activation, "moe": keys})


def mixture(**keys: Any) -> MixtureOfExperts:
    found = MixtureOfExperts(settings(**keys)).double()
    with torch.no_grad():
        for tensor in found.parameters():
            tensor.normal_()
    return found


def one_expert(branch: MixtureOfExperts, expert: int) -> FeedForward:
    """A plain feed-forward with the expert's matrices."""
    keys = {"d_model": 8, "n_heads": 2, "activation": "swiglu" if branch.experts.gate else "relu"}
    plain = FeedForward(ModelSettings.model_validate(keys), 5).double()
    plain.load_state_dict({name: stack[expert] for name, stack in branch.experts.state_dict().items()})
    return plain


@torch.no_grad()
def by_hand(branch: MixtureOfExperts, x_D: Tensor) -> Tensor:
    """One token: scores, the best groups, the best experts in them, and their weighted sum."""
    moe, logits = branch.router.moe, [float(row @ x_D) for row in branch.router.weight]
    if branch.router.bias is None:
        scores = [math.exp(logit) / sum(math.exp(other) for other in logits) for logit in logits]
        merits = scores
    else:
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        merits = [score + float(kept) for score, kept in zip(scores, branch.router.bias, strict=True)]
    size = moe.n_experts // moe.n_groups
    groups = [range(start, start + size) for start in range(0, moe.n_experts, size)]
    groups.sort(key=lambda group: -sum(sorted((merits[e] for e in group), reverse=True)[:2]))
    allowed = [expert for group in groups[: moe.n_active_groups] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -merits[expert])[: moe.n_active]
    whole = sum(scores[expert] for expert in chosen) if moe.normalized else 1.0
    total = sum(scores[e] / whole * moe.weight_scale * one_expert(branch, e)(x_D) for e in chosen)
    assert isinstance(total, Tensor)
    return total if branch.shared is None else total + branch.shared(x_D)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"activation": "relu", "n_active": 6},
        {"normalized": False, "weight_scale": 1.7, "n_shared": 2},
        {"router": "sigmoid"},
        {"router": "sigmoid", "n_groups": 3, "n_active_groups": 2, "n_active": 3, "normalized": False},
        {"n_groups": 2},
    ],
    ids=str,
)
def test_each_token_takes_its_experts(keys: dict[str, Any]) -> None:
    branch, x = mixture(**keys), torch.randn(2, 7, 8, dtype=torch.float64)
    found, _ = branch(x)
    for b in range(2):
        for t in range(7):
            torch.testing.assert_close(found[b, t], by_hand(branch, x[b, t]), rtol=1e-9, atol=1e-9)


def test_the_correction_chooses_and_weighs_nothing() -> None:
    branch, x = mixture(router="sigmoid", n_active=1, normalized=False), torch.randn(1, 9, 8, dtype=torch.float64)
    assert branch.router.bias is not None
    branch.router.bias.copy_(torch.tensor([0, 0, 0, 0, 100.0, 0]))
    found, _ = branch(x)
    score = torch.sigmoid(x @ branch.router.weight[4])
    torch.testing.assert_close(found, score[..., None] * one_expert(branch, 4)(x))
    found.sum().backward()
    assert branch.router.bias.grad is None


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_a_grouped_product_is_one_for_each_group(sizes: list[int]) -> None:
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(sizes), 2, 3, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0).int()
    parts = [rows @ matrix.T for rows, matrix in zip(x.split(sizes), weight, strict=True)]
    found, wanted = grouped_linear(x, weight, ends), torch.cat(parts)
    torch.testing.assert_close(found, wanted)
    slope = torch.randn_like(wanted)
    ours = torch.autograd.grad(found, (x, weight), slope)
    theirs = torch.autograd.grad(wanted, (x, weight), slope)
    torch.testing.assert_close(ours, theirs)


def test_a_grouped_product_is_differentiable_in_one_operand_alone() -> None:
    x, weight, ends = torch.randn(3, 2), torch.randn(2, 2, 2), torch.tensor([1, 3], dtype=torch.int32)
    grouped_linear(x.requires_grad_(), weight, ends).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_it_passes_torchs_own_checks_of_an_operator() -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.bptool.grouped_linear.default, (x, weight, torch.tensor([2, 5], dtype=torch.int32)))


def test_shapes_do_not_depend_on_values() -> None:
    with FakeTensorMode():
        branch = MixtureOfExperts(settings(router="sigmoid", n_groups=3, n_active_groups=1))
        y, uneven = branch(torch.randn(2, 7, 8))
        (y.sum() + uneven).backward()
    assert y.shape == (2, 7, 8)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in branch.parameters() if p.requires_grad)


def test_imbalance() -> None:
    even = torch.full((4, 4), 1 / 4)
    assert imbalance(even, torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])).item() == pytest.approx(2)
    alone = torch.tensor([[1.0, 0, 0, 0]] * 4)
    assert imbalance(alone, torch.zeros(4, 1, dtype=torch.int64)).item() == pytest.approx(4)
    # f = (1, 1/2, 1/2, 0), P = (.4, .3, .2, .1)
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2)
    assert imbalance(shares, torch.tensor([[0, 1], [2, 0]])).item() == pytest.approx(4 * (0.4 + 0.15 + 0.1))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_descent_on_the_imbalance_spreads_the_tokens(router: str) -> None:
    branch, x = mixture(router=router), torch.randn(1, 200, 8, dtype=torch.float64)
    if branch.router.bias is not None:
        branch.router.bias.zero_()
    with torch.no_grad():
        branch.router.weight.mul_(0.1)
        x[..., 0] = 1
        branch.router.weight[0, 0] += 3  # all tokens want expert 0
    first = branch(x)[1].item()
    optimizer = torch.optim.SGD([branch.router.weight], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        branch(x)[1].backward()
        optimizer.step()
    assert first > 2.4
    assert branch(x)[1].item() == pytest.approx(2, abs=0.1)


def test_low_precision_stays_near() -> None:
    exact, x = mixture(), torch.randn(2, 20, 8, dtype=torch.float64)
    wanted, _ = exact(x)
    single = mixture().float()
    single.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = single(x.float())
    mixed.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in single.parameters())
    close = (mixed.double() - wanted).abs().amax(-1) < 0.1 * wanted.abs().max()
    assert close.double().mean() > 0.9  # a choice between near equals may fall otherwise
