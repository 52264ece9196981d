"""Attention's identities: each fails, alone, where a backward written by hand has the texts' mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from identity_checks import NAMES, failed, named, of_transformer
from torch import Tensor

from bptool.analysis.gradcheck.identities.check import observed_identities
from bptool.model import attention


class HandWritten(torch.autograd.Function):
    """Causal attention with a backward by hand, and a bug in it where one is named."""

    bug = ""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        p = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.groups = groups
        y: Tensor = p @ v
        return y

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, p = ctx.saved_tensors
        bug, scale = HandWritten.bug, q.shape[-1] ** -0.5
        dp = slope @ v.mT
        row = (p * dp).sum(-1, keepdim=True)
        ds = p * dp if bug == "no row sum" else p * (dp - row)
        if bug == "mask off by one":
            ds = ds.tril(-1)
        dq = ds @ k * (1 if bug == "no scale in dQ" else scale)
        dk = (ds if bug == "dS not transposed" else ds.mT) @ q * (1 if bug == "no scale in dK" else scale)
        if bug == "K transposed":
            dq = (k.mT.reshape(k.shape).mT @ ds.mT).mT * scale
        dv = (dp if bug == "dP for P" else p).mT @ slope
        if bug == "one element":
            dv[0, 0, 3, 2] *= 1 + 1e-6
        if bug == "one head":
            dq[:, 1] = dq[:, 0]
        if bug == "one key head's sum":
            return dq, dk[:, :: ctx.groups], dv.unflatten(1, (-1, ctx.groups)).sum(2)
        return dq, *(x.unflatten(1, (-1, ctx.groups)).sum(2) for x in (dk, dv))


QUERY, KEY, VALUE = NAMES[2:5]
BUGS: dict[str, list[str]] = {
    "": [],
    "no scale in dQ": [QUERY],
    "no scale in dK": [KEY],
    "K transposed": [QUERY],
    "dS not transposed": [KEY],
    "no row sum": [QUERY, KEY],
    "mask off by one": [QUERY, KEY],
    "dP for P": [VALUE],
    "one element": [VALUE, "accumulation"],  # which row of the batch it is depends on how the batch is cut
    "one head": [QUERY],
    "one key head's sum": [KEY],
}


class TestAttention:
    @pytest.mark.parametrize(("bug", "wrong"), BUGS.items())
    def test_a_backward_by_hand(self, monkeypatch: pytest.MonkeyPatch, bug: str, wrong: list[str]) -> None:
        def by_hand(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
            return HandWritten.apply(q, k, v)  # type: ignore[no-untyped-call, no-any-return]

        monkeypatch.setattr(HandWritten, "bug", bug)
        monkeypatch.setattr(attention, "fused_attention", by_hand)
        assert failed(of_transformer({"model.n_kv_heads": 1})) == wrong

    def test_a_forward_without_the_scale(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its gradient is right for what it computes, which is not attention."""
        right = attention.fused_attention
        monkeypatch.setattr(attention, "fused_attention", lambda *inputs, scale: right(*inputs, scale=1.0))
        assert failed(of_transformer()) == [QUERY, KEY, VALUE]

    def test_what_the_forgotten_factor_would_do(self) -> None:
        detail = named(of_transformer().identities, QUERY).detail
        assert "* 0.3536" in detail  # a head is 8 wide
        assert "off by 183%" in detail  # sqrt(8) - 1

    @pytest.mark.parametrize("mask", ["none", "boolean", "added", "causal"])
    @pytest.mark.parametrize("scale", [None, 0.7])
    def test_pytorchs_function_wherever_it_is_called(self, mask: str, scale: float | None) -> None:
        shapes = {"q": (2, 4, 5, 6), "k": (2, 2, 5, 6), "v": (2, 2, 5, 3)}
        q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values())
        seen = torch.rand(5, 5) < 0.5
        seen.fill_diagonal_(True)
        masks = {"boolean": seen, "added": torch.randn(5, 5, dtype=torch.float64)}

        def run() -> Tensor:
            attended = F.scaled_dot_product_attention(
                q, k, v, masks.get(mask), is_causal=mask == "causal", scale=scale, enable_gqa=True
            )
            return (attended * torch.arange(attended.numel()).view_as(attended)).sum() + q.sum()

        found = observed_identities(run)
        assert [identity.name for identity in found] == [QUERY, KEY, VALUE]
        assert all(identity.holds for identity in found)
        assert q.grad is not None  # the sum over both uses, of which the identity saw one

    def test_a_token_that_sees_itself_alone_has_no_gradient_in_its_scores(self) -> None:
        found = of_transformer({"model.sliding_window": 1})
        assert failed(found) == []
        for name in (QUERY, KEY):
            assert named(found.identities, name).figures["blocks.0.attention.gradient_norm"] < 1e-15
            assert named(found.identities, name).tolerance == 0
