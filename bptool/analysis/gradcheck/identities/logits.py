"""d loss / d logits = (softmax - one-hot) / number of counted tokens.

Shapes: N tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bptool.analysis.gradcheck.identities.identity import Agreement, Identity, agree, as_identity, rounding_unit
from bptool.model.loss import NextTokenLoss

NAME = "logits_gradient"


class LogitsGradient:
    """Watches the built-in transformer's loss in one forward and backward.

    The loss is asked twice: in the model's own run, where its gradient shows in the hidden states, and alone with the
    identity for a projection, whose inputs are then the logits themselves: a fused loss shows them nowhere else.
    """

    def __init__(self, model: nn.Module) -> None:
        (loss,) = (module for module in model.modules() if isinstance(module, NextTokenLoss))
        self._loss = loss
        self._inputs: tuple[Any, ...] = ()
        self._handle = loss.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].requires_grad:
            inputs[0].retain_grad()
        self._inputs = inputs

    def close(self) -> None:
        """Stop watching."""
        self._handle.remove()

    def identity(self) -> Identity:
        """After the backward."""
        x_ND, weight_VD, targets_N, kind = self._inputs
        x, weight_VD, softcap = x_ND.detach(), weight_VD.detach(), self._loss.softcap
        raw_NV = x @ weight_VD.mT
        slope_NV, size_NV, roundings = cross_entropy_slope(raw_NV, targets_N, softcap=softcap)
        unit = rounding_unit(x.dtype)

        logits_NV = raw_NV.clone().requires_grad_()
        eye_VV = torch.eye(raw_NV.shape[1], dtype=x.dtype, device=x.device)
        (found_NV,) = torch.autograd.grad(self._loss(logits_NV, eye_VV, targets_N, kind), logits_NV)
        alone = agree(found_NV, slope_NV, roundings * unit * size_NV, "the logits")

        # The logits' own rounding moves each probability by as much; the last product is V terms long.
        moved = 2 * x.shape[1] * float((x.abs() @ weight_VD.abs().mT).max()) if x.numel() else 0.0
        bound_ND = (roundings + moved + raw_NV.shape[1]) * unit * (size_NV @ weight_VD.abs())
        inside = agree(x_ND.grad, slope_NV @ weight_VD, bound_ND, "the hidden states below the logits")
        return as_identity(NAME, [alone, inside], _sentence(found_NV, targets_N, softcap), _figures(found_NV))


def cross_entropy_slope(
    logits_NV: Tensor, targets_N: Tensor, *, softcap: float = 0.0, share: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """The formula's side: the gradient of the mean cross-entropy at the logits, ignored targets (negative) left out.

    Args:
        softcap: logits are bent by c tanh(z / c) first, whose slope 1 - tanh^2 follows by the chain rule.
        share: each token's weight in the loss, [N]; None: 1 / number of counted tokens.

    Returns:
        The gradient [N, V], the same with absolute values for a bound, and how many roundings an element passes.
    """
    bend_NV = torch.tanh(logits_NV / softcap) if softcap else torch.zeros_like(logits_NV)
    bent_NV = softcap * bend_NV if softcap else logits_NV
    p_NV, counted_N = bent_NV.softmax(-1), targets_N >= 0
    one_hot_NV = F.one_hot(targets_N.clamp(min=0), logits_NV.shape[1]).to(p_NV.dtype)
    counts_N = counted_N.to(p_NV.dtype)
    share_N1 = (counts_N / counts_N.sum().clamp(min=1) if share is None else share * counts_N)[:, None]
    slope_NV = (p_NV - one_hot_NV) * (1 - bend_NV.square()) * share_N1
    size_NV = (p_NV + one_hot_NV) * (1 + bend_NV.square()) * share_N1.abs()
    # A sum over V, exp of a difference up to the largest, tanh, and a handful of products, on both sides.
    spread = float((bent_NV.amax(-1) - bent_NV.amin(-1)).max()) if bent_NV.numel() else 0.0
    return slope_NV, size_NV, 2.0 * (logits_NV.shape[1] + 4 * spread + 16)


def of_call(logits: Tensor, targets: Tensor, share: Tensor, found: Tensor | None, where: str) -> Agreement:
    """A call of `cross_entropy` in a user's model: logits [N, V], each token's weight in the loss, and the gradient."""
    slope_NV, size_NV, roundings = cross_entropy_slope(logits, targets, share=share)
    return agree(found, slope_NV, roundings * rounding_unit(logits.dtype) * size_NV, where)


def _sentence(slope_NV: Tensor, targets_N: Tensor, softcap: float) -> str:
    counted, tokens = int((targets_N >= 0).sum()), targets_N.numel()
    bent = f", through the softcap's slope 1 - tanh^2(z / {softcap:g})" if softcap else ""
    ignored = f"; the {tokens - counted} ignored tokens' gradient is 0" if counted < tokens else ""
    return (
        f"d loss/d logits = (softmax - one-hot) / {counted} counted tokens{bent}; its norm is"
        f" {float(slope_NV.norm()):.4g}{ignored}"
    )


def _figures(slope_NV: Tensor) -> dict[str, float]:
    return {"gradient_norm": float(slope_NV.norm()), "largest_row_sum": float(slope_NV.sum(-1).abs().max())}
