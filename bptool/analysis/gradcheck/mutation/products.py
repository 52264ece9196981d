"""Bugs that people write into the backwards of linear layers and of attention.

B batch, H heads, T queries, S keys, Q width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bptool.analysis.gradcheck.mutation.calls import Call, Formula
from bptool.analysis.gradcheck.mutation.formulas import FormulaBug, scaled_slope


def _linear(made: Callable[[Tensor, Tensor, Tensor | None], Tensor | None]) -> Formula:
    def formula(call: Call) -> Tensor | None:
        x, weight, bias = (call.argument(place, name) for place, name in enumerate(("input", "weight", "bias")))
        return made(x, weight, bias)

    return formula


def _weight_seeing(changed: Callable[[Tensor], Tensor | None]) -> Formula:
    """The weight's gradient from other inputs; the input's own is right."""

    def made(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        seen = changed(x.detach())
        if seen is None or not weight.requires_grad:
            return None
        return F.linear(x, weight.detach(), bias) + F.linear(seen, weight)

    return _linear(made)


def _without_last(x: Tensor) -> Tensor | None:
    if x.dim() < 2 or x.shape[-2] < 2:
        return None
    return torch.cat([x[..., :-1, :], torch.zeros_like(x[..., -1:, :])], -2)


def _weight_not_transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1] or not x.requires_grad:
        return None
    return F.linear(x, weight.detach().mT) + F.linear(x.detach(), weight, bias)


def _bias_forgotten(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None or not bias.requires_grad else F.linear(x, weight, bias.detach())


@dataclass(frozen=True)
class _Attention:
    """A call of scaled_dot_product_attention without dropout."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    grouped: bool

    @classmethod
    def of(cls, call: Call) -> _Attention | None:
        q, k, v, mask = (call.argument(i, n) for i, n in enumerate(("query", "key", "value", "attn_mask")))
        if call.argument(4, "dropout_p", 0.0):
            return None
        scale = call.argument(6, "scale")
        causal, grouped = call.argument(5, "is_causal", False), call.argument(7, "enable_gqa", False)
        return cls(q, k, v, mask, causal, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, grouped)

    def over(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same attention of other tensors."""
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.causal, scale=self.scale, enable_gqa=self.grouped
        )

    def masked_off_by_one(self) -> Tensor | None:
        """Each token sees the next one, too."""
        if not self.causal:
            return None
        allowed = torch.ones(self.q.shape[-2], self.k.shape[-2], dtype=torch.bool, device=self.q.device).tril(1)
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, attn_mask=allowed, scale=self.scale, enable_gqa=self.grouped
        )

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Keys and values, one for each query head."""
        if not self.grouped:
            return self.k, self.v
        times = self.q.shape[-3] // self.k.shape[-3]
        return self.k.repeat_interleave(times, -3), self.v.repeat_interleave(times, -3)

    def scores(self) -> Tensor:
        """Masked, ... x T x S."""
        scores = self.q @ self.expanded()[0].mT * self.scale
        if self.causal:
            return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        if self.mask is None:
            return scores
        return scores.masked_fill(~self.mask, -math.inf) if self.mask.dtype == torch.bool else scores + self.mask


def _attention(made: Callable[[_Attention], Tensor | None]) -> Formula:
    def formula(call: Call) -> Tensor | None:
        attention = _Attention.of(call)
        return None if attention is None else made(attention)

    return formula


def _sum_dropped(a: _Attention) -> Tensor:
    scores = a.scores()
    return (scores - scores.detach().logsumexp(-1, keepdim=True)).exp() @ a.expanded()[1]


def _weights_not_transposed(a: _Attention) -> Tensor | None:
    if a.q.shape[-2] != a.k.shape[-2] or a.q.shape[-2] == 1:
        return None
    return a.over(a.q, a.k, a.v.detach()) + a.scores().detach().softmax(-1).mT @ a.expanded()[1]


def _one_head(a: _Attention) -> Tensor | None:
    if a.q.dim() < 4 or a.q.shape[-3] < 2:
        return None
    heads = torch.arange(a.q.shape[-3], device=a.q.device).view(-1, 1, 1)
    return scaled_slope(a.over(a.q, a.k, a.v), (heads > 0).to(a.q.dtype))


def _last_key(a: _Attention) -> Tensor | None:
    if a.k.shape[-2] < 2:
        return None
    counts = (torch.arange(a.k.shape[-2], device=a.k.device).view(-1, 1) < a.k.shape[-2] - 1).to(a.k.dtype)
    return a.over(a.q, scaled_slope(a.k, counts), scaled_slope(a.v, counts))


_ATTENTION = ("scaled_dot_product_attention",)
PRODUCT_BUGS: tuple[FormulaBug, ...] = (
    FormulaBug("weight gradient without the last row", ("linear",), _weight_seeing(_without_last)),
    FormulaBug(
        "weight gradient of inputs in bfloat16", ("linear",), _weight_seeing(lambda x: x.bfloat16().to(x.dtype))
    ),
    FormulaBug("weight gradient of inputs in float32", ("linear",), _weight_seeing(lambda x: x.float().to(x.dtype))),
    FormulaBug("weight gradient is a mean", ("linear",), _weight_seeing(lambda x: x / max(x[..., 0].numel(), 1))),
    FormulaBug("input gradient with the weight not transposed", ("linear",), _linear(_weight_not_transposed)),
    FormulaBug("bias gradient forgotten", ("linear",), _linear(_bias_forgotten)),
    FormulaBug(
        "scale dropped in dQ", _ATTENTION, _attention(lambda a: a.over(scaled_slope(a.q, 1 / a.scale), a.k, a.v))
    ),
    FormulaBug(
        "scale applied twice in dK", _ATTENTION, _attention(lambda a: a.over(a.q, scaled_slope(a.k, a.scale), a.v))
    ),
    FormulaBug("softmax's sum dropped", _ATTENTION, _attention(_sum_dropped)),
    FormulaBug("mask off by one", _ATTENTION, _attention(_Attention.masked_off_by_one)),
    FormulaBug("dV with P not transposed", _ATTENTION, _attention(_weights_not_transposed)),
    FormulaBug("scores detached", _ATTENTION, _attention(lambda a: a.over(a.q.detach(), a.k.detach(), a.v))),
    FormulaBug("one head forgotten", _ATTENTION, _attention(_one_head)),
    FormulaBug("last key forgotten", _ATTENTION, _attention(_last_key)),
)
