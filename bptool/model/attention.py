"""The attention branch of a block: causal, grouped-query, fused or written out.

Shapes: B batch, T tokens, S tokens attended to (S = T), D model width, H query heads, K key and value heads,
Q head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bptool.config.schema import ModelSettings
from bptool.hardware import acts_as_cuda
from bptool.model.autocast import cast_once
from bptool.model.loss import softcapped
from bptool.model.normalization import make_inner_norm
from bptool.model.position import Rotation, rotate, yarn_score_factor

Attend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
"""Queries, keys, values, dropout, and what to add to the scores (None: what makes them causal) to the output."""


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017); query heads share keys and values where these are fewer."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        d_model, self.head_dim = settings.d_model, settings.head_dim
        bias, qkv_bias = settings.bias, settings.bias or settings.qkv_bias
        self.query = nn.Linear(d_model, settings.n_heads * self.head_dim, bias=qkv_bias)
        self.key = nn.Linear(d_model, settings.n_kv_heads * self.head_dim, bias=qkv_bias)
        self.value = nn.Linear(d_model, settings.n_kv_heads * self.head_dim, bias=qkv_bias)
        self.output = nn.Linear(settings.n_heads * self.head_dim, d_model, bias=bias)
        inner_norm = partial(make_inner_norm, settings, self.head_dim, settings.norm_eps)
        self.query_norm = inner_norm() if settings.qk_norm else None
        self.key_norm = inner_norm() if settings.qk_norm else None
        self.attend = attend_as(settings)
        self.dropout = settings.dropout

    def forward(self, x_BTD: Tensor, rotation: Rotation | None, mask_TS: Tensor | None = None) -> Tensor:
        """[B, T, D] to [B, T, D].

        Args:
            x_BTD: the block's normalised input.
            rotation: turns queries and keys; None leaves them alone.
            mask_TS: added to the scores; None: each token attends to itself and to all before it.
        """
        q_BHTQ, k_BKSQ, v_BKSQ = (
            project(input_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project, input_BTD in zip((self.query, self.key, self.value), cast_once(x_BTD, 3), strict=True)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q_BHTQ, k_BKSQ = self.query_norm(q_BHTQ), self.key_norm(k_BKSQ)
        if rotation is not None:
            q_BHTQ, k_BKSQ = rotate(q_BHTQ, rotation), rotate(k_BKSQ, rotation)
        # Normalising and rotating raise low precision to float32; the kernels want all three alike.
        q_BHTQ, k_BKSQ = q_BHTQ.to(v_BKSQ.dtype), k_BKSQ.to(v_BKSQ.dtype)
        y_BHTQ = self.attend(q_BHTQ, k_BKSQ, v_BKSQ, self.dropout if self.training else 0.0, mask_TS)
        y_BTD: Tensor = self.output(y_BHTQ.transpose(1, 2).flatten(2))
        return y_BTD


def attend_as(settings: ModelSettings) -> Attend:
    """The attention that `settings` ask for; no fused kernel bends scores, so a softcap is written out."""
    scale = score_scale(settings)
    if settings.attention == "eager" or settings.attention_softcap:
        return partial(eager_attention, scale=scale, softcap=settings.attention_softcap)
    return partial(fused_attention, scale=scale)


def score_scale(settings: ModelSettings) -> float | None:
    """What attention scores are multiplied with; None: 1 / sqrt(Q), the usual."""
    stretch = yarn_score_factor(settings.rope) if settings.position == "rope" else 1.0
    if settings.query_scale_dim == settings.head_dim and stretch == 1:
        return None
    return float(settings.query_scale_dim**-0.5 * stretch)


def window_mask(n_tokens: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What to add to the scores where a token attends to the last `window` tokens, itself among them: 0 or -inf."""
    distance_TS = torch.arange(n_tokens, device=device)[:, None] - torch.arange(n_tokens, device=device)
    seen_TS = (distance_TS >= 0) & (distance_TS < window)
    return torch.zeros(n_tokens, n_tokens, dtype=dtype, device=device).masked_fill_(~seen_TS, -torch.inf)


def fused_attention(
    q_BHTQ: Tensor,
    k_BKSQ: Tensor,
    v_BKSQ: Tensor,
    dropout: float,
    mask_TS: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's fused attention: weights are never held, except where no fused kernel takes these inputs."""
    grouped = k_BKSQ.shape[1] < q_BHTQ.shape[1]
    if grouped and acts_as_cuda(q_BHTQ) and (q_BHTQ.dtype == torch.float32 or mask_TS is not None):
        # CUDA's only fused kernel for float32, or for a mask, knows no groups; asked for them, PyTorch falls back to
        # holding all weights.
        k_BKSQ, v_BKSQ = _copied_to_heads(k_BKSQ, q_BHTQ), _copied_to_heads(v_BKSQ, q_BHTQ)
        grouped = False
    causal = mask_TS is None
    return F.scaled_dot_product_attention(
        q_BHTQ, k_BKSQ, v_BKSQ, attn_mask=mask_TS, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def eager_attention(
    q_BHTQ: Tensor,
    k_BKSQ: Tensor,
    v_BKSQ: Tensor,
    dropout: float,
    mask_TS: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The same written out, `softmax(q k^T / sqrt(Q)) v`: all the weights are held, softmax is in float32 or better.

    With a softcap the scores are bent before they are masked.
    """
    k_BHSQ, v_BHSQ = _copied_to_heads(k_BKSQ, q_BHTQ), _copied_to_heads(v_BKSQ, q_BHTQ)
    scores_BHTS = q_BHTQ @ k_BHSQ.mT * (q_BHTQ.shape[-1] ** -0.5 if scale is None else scale)
    scores_BHTS = softcapped(scores_BHTS, softcap)
    if mask_TS is None:
        future_TS = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTQ.device).triu(1)
        scores_BHTS = scores_BHTS.masked_fill(future_TS, -torch.inf)
    else:
        scores_BHTS = scores_BHTS + mask_TS
    exact = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = scores_BHTS.softmax(-1, dtype=exact)
    return F.dropout(weights_BHTS.to(v_BHSQ.dtype), dropout) @ v_BHSQ


def _copied_to_heads(x_BKSQ: Tensor, q_BHTQ: Tensor) -> Tensor:
    """One copy of its key or value head for each query head: query head h uses head h // (H / K)."""
    return x_BKSQ.repeat_interleave(q_BHTQ.shape[1] // x_BKSQ.shape[1], dim=1)
