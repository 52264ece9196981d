"""Attention's backward: from the gradient of its output to those of queries, keys and values.

    P = softmax(S),  S = c Q K^T         dV = P^T dO       dP = dO V^T
    dS = P * (dP - rowsum(P * dP))       dQ = c dS K       dK = c dS^T Q

c is 1 / sqrt(d), where nothing else is asked. Queries and keys are those that meet: normalised and rotated already.
Where query heads share a key head, its gradient is the sum over them; where scores are bent by a softcap, dS passes
that slope too.

Shapes: B batch (any number of dimensions), T tokens, S tokens attended to, H query heads, K key and value heads, Q head
width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bptool.analysis.gradcheck.identities.identity import Agreement, Identity, agree, as_identity, rounding_unit
from bptool.config.schema import ModelSettings
from bptool.model.attention import Attention, score_scale
from bptool.model.latent_attention import LatentAttention

QUERY, KEY, VALUE = "attention_query_gradient", "attention_key_gradient", "attention_value_gradient"


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention in a model, after the backward: its tensors with their `.grad`.

    Attributes:
        q, k, v, output: [B, H, T, Q], [B, K, S, Q], [B, K, S, V], [B, H, T, V].
        scale: what scores are multiplied with.
        softcap: scores are bent by c tanh(s / c); 0: they are not.
        mask: booleans (which pairs meet) or numbers that are added to the scores; None: every pair meets.
        causal: a token attends to itself and those before it.
        where: in words.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    scale: float
    softcap: float
    mask: Tensor | None
    causal: bool
    where: str


class AttentionCalls:
    """Watches each attention of the built-in transformer in one forward and backward."""

    def __init__(self, model: nn.Module, settings: ModelSettings) -> None:
        named = [(name, m) for name, m in model.named_modules() if isinstance(m, Attention | LatentAttention)]
        self.calls: list[AttentionCall] = []
        self._settings = settings
        self._own = [(module, module.attend) for _, module in named]
        for name, module in named:
            module.attend = self._recording(module.attend, name)

    def _recording(self, attend: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        scale = score_scale(self._settings)

        def recorded(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None) -> Tensor:
            assert dropout == 0, "the formulas know no dropout"
            q, k, v = alias(q), alias(k), alias(v)
            output = watched(attend(q, k, v, dropout, mask))
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            self.calls.append(
                AttentionCall(q, k, v, output, factor, self._settings.attention_softcap, mask, mask is None, name)
            )
            return output

        return recorded

    def close(self) -> None:
        """Stop watching."""
        for module, attend in self._own:
            module.attend = attend

    def identities(self) -> list[Identity]:
        """After the backward."""
        return of_calls(self.calls)


def of_calls(calls: Sequence[AttentionCall]) -> list[Identity]:
    """The three identities over all calls; none where there was no call."""
    if not calls:
        return []
    sides = [_formulas(call) for call in calls]
    scales = sorted({call.scale for call in calls})
    scale = f"{scales[0]:.4g}" if len(scales) == 1 else f"{scales[0]:.4g} to {scales[-1]:.4g}"
    n_calls = f"{len(calls)} attention layer{'s' if len(calls) > 1 else ''}"
    without = max(abs(1 / scale - 1) for scale in scales)
    dropped = f"; without that factor it would be off by {without:.0%}" if without else ""
    texts = {
        QUERY: f"dQ = dS K * {scale} (1 / sqrt(d), or what the model asks for) in {n_calls}{dropped}",
        KEY: f"dK = dS^T Q * {scale} in {n_calls}, dS = P * (dP - rowsum(P * dP))",
        VALUE: f"dV = P^T dO in {n_calls}",
    }
    found = []
    for index, (name, text) in enumerate(texts.items()):
        agreements = [agreement[index] for agreement in sides]
        norms = {call.where: _norm((call.q, call.k, call.v)[index].grad) for call in calls}
        figures = {f"{where}.gradient_norm": norm for where, norm in norms.items()}
        range_ = f"; its norm is {min(norms.values()):.3g} to {max(norms.values()):.3g}"
        found.append(as_identity(name, agreements, text + range_, figures))
    return found


def _formulas(call: AttentionCall) -> tuple[Agreement, Agreement, Agreement]:
    """Autograd's gradients of one call beside the formulas', each with its bound."""
    groups = call.q.shape[-3] // call.k.shape[-3]
    q, k, v = call.q.detach(), _to_heads(call.k.detach(), groups), _to_heads(call.v.detach(), groups)
    slope = torch.zeros_like(call.output) if call.output.grad is None else call.output.grad
    p, bend = _weights(q, k, call)
    dp = slope @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * (1 - bend.square())
    # The same with absolute values.
    size_dp = slope.abs() @ v.abs().mT
    size_ds = p * (size_dp + (p * size_dp).sum(-1, keepdim=True)) * (1 + bend.square())
    size = _roundings(q, k, v, call.scale) * rounding_unit(q.dtype)
    dq, size_dq = ds @ k * call.scale, size * (size_ds @ k.abs()) * abs(call.scale)
    dk, size_dk = ds.mT @ q * call.scale, size * (size_ds.mT @ q.abs()) * abs(call.scale)
    dv, size_dv = p.mT @ slope, size * (p.mT @ slope.abs())
    return (
        agree(call.q.grad, dq, size_dq, f"{call.where}, queries"),
        agree(call.k.grad, _to_groups(dk, groups), _to_groups(size_dk, groups), f"{call.where}, keys"),
        agree(call.v.grad, _to_groups(dv, groups), _to_groups(size_dv, groups), f"{call.where}, values"),
    )


def _weights(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Softmax of the scores, and tanh of what a softcap bends (0 where nothing does)."""
    scores = q @ k.mT * call.scale
    bend = torch.tanh(scores / call.softcap) if call.softcap else torch.zeros_like(scores)
    scores = call.softcap * bend if call.softcap else scores
    if call.causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if call.mask is not None:
        added = (
            call.mask if call.mask.dtype != torch.bool else torch.zeros_like(scores).masked_fill(~call.mask, -torch.inf)
        )
        scores = scores + added
    return scores.softmax(-1), bend


def _roundings(q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    """How many roundings an element passes, on both sides together.

    A score is a sum of Q products; its error moves each weight by as much, once above and once below the fraction line.
    Weights enter twice; the sums over tokens and value widths follow.
    """
    moved = (q.shape[-1] + 4) * float((q.abs() @ k.abs().mT).max()) * abs(scale) if q.numel() and k.numel() else 0.0
    sums = q.shape[-1] + v.shape[-1] + 3 * k.shape[-2] + q.shape[-2] + q.shape[-3]
    return 2 * (4 * moved + sums + 32)


def _to_heads(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, dim=-3) if groups > 1 else x


def _to_groups(x: Tensor, groups: int) -> Tensor:
    """Sums over the query heads that share a key head."""
    return x.unflatten(-3, (-1, groups)).sum(-3) if groups > 1 else x


def alias(x: Tensor) -> Tensor:
    """The same numbers under another name: its gradient is what comes back through this one use alone."""
    return watched(x.view_as(x))


def watched(x: Tensor) -> Tensor:
    """`x`, which will keep its gradient where it gets one."""
    if x.requires_grad:
        x.retain_grad()
    return x


def _norm(gradient: Any) -> float:
    return 0.0 if gradient is None else float(gradient.norm())
