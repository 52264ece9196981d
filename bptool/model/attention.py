"""The attention branch of a block: causal, grouped-query, fused or written out.

Shapes: B batch, T tokens, S tokens attended to (S = T), D model width, H query heads, K key and value heads,
Q head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bptool.config.schema import ModelSettings
from bptool.hardware import acts_as_cuda
from bptool.model.normalization import RMSNorm
from bptool.model.position import Rotation, rotate


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017); query heads share keys and values where these are fewer."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        d_model, self.head_dim, bias = settings.d_model, settings.head_dim, settings.bias
        self.query = nn.Linear(d_model, settings.n_heads * self.head_dim, bias=bias)
        self.key = nn.Linear(d_model, settings.n_kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(d_model, settings.n_kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(settings.n_heads * self.head_dim, d_model, bias=bias)
        self.query_norm = RMSNorm(self.head_dim, eps=settings.norm_eps) if settings.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps=settings.norm_eps) if settings.qk_norm else None
        self.attend = {"sdpa": fused_attention, "eager": eager_attention}[settings.attention]
        self.dropout = settings.dropout

    def forward(self, x_BTD: Tensor, rotation: Rotation | None) -> Tensor:
        """[B, T, D] to [B, T, D]; `rotation` turns queries and keys, None leaves them alone."""
        q_BHTQ, k_BKSQ, v_BKSQ = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q_BHTQ, k_BKSQ = self.query_norm(q_BHTQ), self.key_norm(k_BKSQ)
        if rotation is not None:
            q_BHTQ, k_BKSQ = rotate(q_BHTQ, rotation), rotate(k_BKSQ, rotation)
        # Normalising and rotating raise low precision to float32; the kernels want all three alike.
        q_BHTQ, k_BKSQ = q_BHTQ.to(v_BKSQ.dtype), k_BKSQ.to(v_BKSQ.dtype)
        y_BHTQ = self.attend(q_BHTQ, k_BKSQ, v_BKSQ, self.dropout if self.training else 0.0)
        y_BTD: Tensor = self.output(y_BHTQ.transpose(1, 2).flatten(2))
        return y_BTD


def fused_attention(q_BHTQ: Tensor, k_BKSQ: Tensor, v_BKSQ: Tensor, dropout: float) -> Tensor:
    """PyTorch's fused attention: weights are never held, except where no fused kernel takes these inputs."""
    grouped = k_BKSQ.shape[1] < q_BHTQ.shape[1]
    if grouped and acts_as_cuda(q_BHTQ) and q_BHTQ.dtype == torch.float32:
        # CUDA's only fused float32 kernel knows no groups; asked for them, PyTorch falls back to holding all weights.
        k_BKSQ, v_BKSQ = _copied_to_heads(k_BKSQ, q_BHTQ), _copied_to_heads(v_BKSQ, q_BHTQ)
        grouped = False
    return F.scaled_dot_product_attention(q_BHTQ, k_BKSQ, v_BKSQ, dropout_p=dropout, is_causal=True, enable_gqa=grouped)


def eager_attention(q_BHTQ: Tensor, k_BKSQ: Tensor, v_BKSQ: Tensor, dropout: float) -> Tensor:
    """The same written out, `softmax(q k^T / sqrt(Q)) v`: all the weights are held, softmax is in float32 or better."""
    k_BHSQ, v_BHSQ = _copied_to_heads(k_BKSQ, q_BHTQ), _copied_to_heads(v_BKSQ, q_BHTQ)
    scores_BHTS = q_BHTQ @ k_BHSQ.mT * q_BHTQ.shape[-1] ** -0.5
    future_TS = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTQ.device).triu(1)
    exact = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = scores_BHTS.masked_fill(future_TS, -torch.inf).softmax(-1, dtype=exact)
    return F.dropout(weights_BHTS.to(v_BHSQ.dtype), dropout) @ v_BHSQ


def _copied_to_heads(x_BKSQ: Tensor, q_BHTQ: Tensor) -> Tensor:
    """One copy of its key or value head for each query head: query head h uses head h // (H / K)."""
    return x_BKSQ.repeat_interleave(q_BHTQ.shape[1] // x_BKSQ.shape[1], dim=1)
