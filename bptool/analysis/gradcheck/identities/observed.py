"""Attention and cross-entropy in a user's model: PyTorch's own functions, seen where they are called."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bptool.analysis.gradcheck.identities import logits
from bptool.analysis.gradcheck.identities.attention import AttentionCall, alias, of_calls, watched
from bptool.analysis.gradcheck.identities.identity import Agreement, Identity, as_identity

_SIGNATURE = inspect.signature(F.cross_entropy)


class ObservedFunctions(TorchFunctionMode):
    """Records calls of `scaled_dot_product_attention` and `cross_entropy` while it is entered.

    Attention that is written out, dropped out, or without the formula's two inputs (probabilities as targets, weights
    for classes, smoothed labels) is left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[AttentionCall] = []
        self.losses: list[tuple[Tensor, Tensor, Tensor, int, str]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As PyTorch calls it for each function."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.cross_entropy:
            return self._loss(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # its own attention is called where no mode sees it
            with patch.object(F, "scaled_dot_product_attention", self._attend):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        options |= {"scale": scale, "enable_gqa": enable_gqa}
        if dropout_p or query.dim() < 3 or not query.requires_grad:
            return attend(query, key, value, **options)
        q, k, v = alias(query), alias(key), alias(value)
        output = watched(attend(q, k, v, **options))
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        where = f"attention {len(self.attention)}"
        mask = None if attn_mask is None else attn_mask.detach()
        self.attention.append(AttentionCall(q, k, v, output, factor, 0.0, mask, is_causal, where))
        return output

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        plain = given["weight"] is None and not given["label_smoothing"] and given["size_average"] is None
        scores, targets = given["input"], given["target"]
        if not plain or given["reduce"] is not None or targets.is_floating_point() or not scores.requires_grad:
            result: Tensor = F.cross_entropy(*args, **kwargs)
            return result
        given["input"] = alias(scores)
        result = watched(F.cross_entropy(*bound.args, **bound.kwargs))
        self.losses.append((given["input"], targets, result, given["ignore_index"], given["reduction"]))
        return result

    def identities(self) -> list[Identity]:
        """After the backward; what was not called is not there."""
        found = of_calls([call for call in self.attention if call.output.grad is not None])
        losses = [call for call in self.losses if call[2].grad is not None]
        if losses:
            agreements = [_loss_agrees(*call, number) for number, call in enumerate(losses)]
            tokens = sum(int((call[1] != call[3]).sum()) for call in losses)
            detail = f"d loss/d logits = (softmax - one-hot) / number of counted targets; {tokens} were counted"
            found.insert(0, as_identity(logits.NAME, agreements, detail))
        return found


attend = F.scaled_dot_product_attention
"""PyTorch's own, whatever stands in its place for a while."""


def _loss_agrees(
    scores: Tensor, targets: Tensor, result: Tensor, ignored: int, reduction: str, number: int
) -> Agreement:
    """One call: its classes moved last, its tokens in one row, and the gradient that came back to its result."""
    classes_last = scores.detach().movedim(1, -1) if scores.dim() > 1 else scores.detach()[None]
    found = scores.grad
    if found is not None:
        found = found.movedim(1, -1) if found.dim() > 1 else found[None]
        found = found.reshape(-1, classes_last.shape[-1])
    flat = targets.reshape(-1)
    counted = flat != ignored
    assert result.grad is not None, "only losses that the backward came through are looked at"
    share = result.grad.reshape(-1).expand(flat.shape) / (counted.sum().clamp(min=1) if reduction == "mean" else 1)
    labels = torch.where(counted, flat, -1)
    flat_scores = classes_last.reshape(-1, classes_last.shape[-1])
    return logits.of_call(flat_scores, labels, share, found, f"loss {number}")
