"""Next-token cross-entropy of a linear projection, in one piece and in chunks.

    plain_cross_entropy    all the logits at once: N x V, several times over by the end of the backward
    linear_cross_entropy   a chunk of tokens at a time; the gradients are made while the chunk's logits are there

Shapes: N tokens, C tokens of a chunk, V vocabulary, D model width, R rows of the weight. A token whose target is
negative (`IGNORED`) counts for nothing; where all are ignored the loss is 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bptool.model.alike import alike
from bptool.model.autocast import matmul_dtype
from bptool.model.early_gradients import computing_gradient
from bptool.units import MIB

LossName = Literal["fused", "plain"]

IGNORED = -100
"""The target of a token that is not predicted; any negative number will do."""

_SMALL_CHUNK_BYTES = 64 * MIB
_PRODUCT_ROWS = 8192


class NextTokenLoss(nn.Module):
    """The loss as a module without parameters, so that whatever watches modules knows what the loss does and holds."""

    def __init__(self, softcap: float) -> None:
        super().__init__()
        self.softcap = softcap

    def forward(self, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, name: LossName) -> Tensor:
        """A scalar: `fused` never holds all the logits, `plain` does."""
        cross_entropy = linear_cross_entropy if name == "fused" else plain_cross_entropy
        return cross_entropy(x_ND, weight_VD, targets_N, self.softcap)


def plain_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float = 0.0) -> Tensor:
    """Mean cross-entropy over the valid targets, with all the logits held at once.

    Low-precision logits are raised to float32 first, as the fused loss does; then they are bent by `softcap`, if any.
    """
    logits_NV = F.linear(x_ND, weight_VD)
    exact = torch.promote_types(logits_NV.dtype, torch.float32)
    targets_N = targets_N.masked_fill(targets_N < 0, IGNORED)
    logits_NV = softcapped(logits_NV.to(exact), softcap)
    total = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
    return total / _count(targets_N)


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float = 0.0) -> Tensor:
    """Mean cross-entropy over the valid targets, never holding more than a chunk of the logits.

    The gradients of `x_ND` and `weight_VD` are computed in the forward, each only where grad mode and its
    `requires_grad` ask for it; the backward scales them. That scaling is in place, so a second backward through the
    same graph raises a RuntimeError. Under autocast both operands are cast once; gradients have their operand's dtype.
    The logits' softmax, the loss and the weight's gradient are summed in float32 (float64 for float64 operands).
    """
    wanted = torch.is_grad_enabled()
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, targets_N, wanted and x_ND.requires_grad, wanted and weight_VD.requires_grad, softcap
    )
    return loss


def softcapped(x: Tensor, softcap: float) -> Tensor:
    """`c tanh(x / c)`, which stays within -c and c (Gemma 2, section 2); for c = 0, x itself."""
    return softcap * torch.tanh(x / softcap) if softcap else x


def chunk_tokens(n_tokens: int, vocab_size: int, d_model: int) -> int:
    """Tokens in a chunk: a large chunk is fast, a small one is small.

    Each chunk reads the whole weight twice and its gradient once, which costs as much as the arithmetic of some
    hundred tokens. So a chunk has an eighth of the tokens, and no more than d_model of them (its logits are then as
    large as the weight's gradient, which is there anyway), but as many as 64 MiB of float32 logits hold, or a 64th of
    them all: finer cuts save little.
    """
    worth_cutting = _SMALL_CHUNK_BYTES // (4 * vocab_size)
    most = max(1, worth_cutting, min(-(-n_tokens // 8), d_model), -(-n_tokens // 64))
    n_chunks = -(-n_tokens // most)
    return -(-n_tokens // n_chunks)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        x_wanted: bool,
        weight_wanted: bool,
        softcap: float,
    ) -> Tensor:
        x_grad_ND = torch.empty_like(x_ND) if x_wanted else None
        weight_grad_VD = _zeros_for_sum(weight_VD) if weight_wanted else None
        total = _sum_over_chunks(x_ND, weight_VD, targets_N, x_grad_ND, weight_grad_VD, softcap)
        count = _count(targets_N)
        ctx.save_for_backward(x_grad_ND, weight_grad_VD, count)
        ctx.weight_dtype = weight_VD.dtype
        ctx.used = False
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        if ctx.used:
            raise RuntimeError(
                "a second backward through linear_cross_entropy: its gradients were scaled in place by the first;"
                " compute the loss again, or use plain_cross_entropy"
            )
        ctx.used = True
        x_grad_ND, weight_grad_VD, count = ctx.saved_tensors
        scale = loss_grad / count
        if x_grad_ND is not None:
            x_grad_ND.mul_(scale)
        if weight_grad_VD is not None:
            weight_grad_VD = weight_grad_VD.mul_(scale).to(ctx.weight_dtype)
        return x_grad_ND, weight_grad_VD, None, None, None, None


def _sum_over_chunks(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    x_grad_ND: Tensor | None,
    weight_grad_VD: Tensor | None,
    softcap: float,
) -> Tensor:
    """Sum of the tokens' losses; the gradients of that sum are written to where there is a tensor for them."""
    dtype = matmul_dtype(x_ND)
    x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
    total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x_ND.device)
    size = chunk_tokens(x_ND.shape[0], *weight_VD.shape)
    for start in alike(range(0, x_ND.shape[0], size)):
        rows = slice(start, start + size)
        x_grad_CD = None if x_grad_ND is None else x_grad_ND[rows]
        total += _chunk_sum(x_ND[rows], weight_VD, targets_N[rows, None], x_grad_CD, weight_grad_VD, softcap)
    return total


def _chunk_sum(
    x_CD: Tensor,
    weight_VD: Tensor,
    targets_C1: Tensor,
    x_grad_CD: Tensor | None,
    weight_grad_VD: Tensor | None,
    softcap: float,
) -> Tensor:
    """The same for one chunk, whose logits are gone when it returns."""
    valid_C1 = targets_C1 >= 0
    losses_and_slopes = partial(_softcapped_losses_and_slopes, softcap=softcap) if softcap else _losses_and_slopes
    loss_C1, slope_CV = losses_and_slopes(x_CD @ weight_VD.mT, targets_C1.clamp(min=0))
    if x_grad_CD is not None or weight_grad_VD is not None:
        slope_CV = slope_CV.to(x_CD.dtype)
    # An ignored token is masked where it is D wide, not V: in its gradient, and as a factor of the weight's.
    if x_grad_CD is not None:
        with computing_gradient("input"):
            x_grad_CD.copy_((slope_CV @ weight_VD).where(valid_C1, 0))
    if weight_grad_VD is not None:
        with computing_gradient("parameters"):
            _add_product(weight_grad_VD, slope_CV, x_CD.where(valid_C1, 0))
    return loss_C1.where(valid_C1, 0).sum()


def _losses_and_slopes(logits_CV: Tensor, targets_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's -log softmax at its target, and that loss's gradient, softmax - one_hot(target).

    Float32 logits are overwritten, step by step, by the gradient. The log of the sum of exponentials is read off the
    likeliest token: it is logit - log p there, and p >= 1 / V cannot underflow.
    """
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    target_logit_C1 = logits_CV.gather(1, targets_C1)
    peak_C1 = logits_CV.amax(1, keepdim=True)
    p_CV = torch.softmax(logits_CV, 1, out=logits_CV)
    log_sum_C1 = peak_C1 - p_CV.amax(1, keepdim=True).log()
    slope_CV = p_CV.scatter_(1, targets_C1, p_CV.gather(1, targets_C1) - 1)
    return log_sum_C1 - target_logit_C1, slope_CV


def _softcapped_losses_and_slopes(logits_CV: Tensor, targets_C1: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """The same behind `softcapped`, whose slope is 1 - tanh^2."""
    exact = torch.promote_types(logits_CV.dtype, torch.float32)
    bend_CV = torch.tanh(logits_CV.to(exact) / softcap)
    loss_C1, slope_CV = _losses_and_slopes(softcap * bend_CV, targets_C1)
    return loss_C1, slope_CV.mul_(1 - bend_CV.square_())


def _add_product(total_VD: Tensor, slope_CV: Tensor, x_CD: Tensor) -> None:
    """`total += slope^T x`; a low-precision product is made a few rows at a time, as it needs a place of its own."""
    if total_VD.dtype == x_CD.dtype:
        torch.addmm(total_VD, slope_CV.mT, x_CD, out=total_VD)  # torch's FLOP counter does not know `addmm_`
        return
    for total_RD, slope_CR in zip(total_VD.split(_PRODUCT_ROWS), slope_CV.split(_PRODUCT_ROWS, dim=1), strict=True):
        total_RD += slope_CR.mT @ x_CD


def _zeros_for_sum(weight_VD: Tensor) -> Tensor:
    return torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))


def _count(targets_N: Tensor) -> Tensor:
    """Number of valid targets, or 1 where there is none: a mean over nothing is then 0 and not NaN."""
    return (targets_N >= 0).sum().clamp(min=1)
