"""Normalisation of the last dimension: LayerNorm, RMSNorm (Zhang and Sennrich 2019), or none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bptool.config.schema import ModelSettings


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight`, in the weight's precision or better."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        # Under autocast a linear layer's output is narrower than the weight; torch's kernel wants the two alike.
        return super().forward(x.to(self.weight.dtype))


class OffsetRMSNorm(RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * (1 + weight)`, in float32 or better, with an output like the weight (Gemma).

    The weight says how far the scale is from 1, so that decay pulls the scale to 1, and bfloat16 is fine near it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        scale = 1 + self.weight.to(exact)
        return F.rms_norm(x.to(exact), self.normalized_shape, scale, self.eps).to(self.weight.dtype)


def make_norm(settings: ModelSettings) -> nn.Module:
    """The normalisation of the residual stream that `settings.norm` names."""
    match settings.norm:
        case "layernorm":
            return nn.LayerNorm(settings.d_model, eps=settings.norm_eps, bias=settings.bias)
        case "rmsnorm":
            return RMSNorm(settings.d_model, eps=settings.norm_eps)
        case "rmsnorm-offset":
            return OffsetRMSNorm(settings.d_model, eps=settings.norm_eps)
        case "none":
            return nn.Identity()


def make_inner_norm(settings: ModelSettings, width: int, eps: float) -> RMSNorm:
    """The normalisation of what is inside attention: RMS, with an offset where the residual stream's has one."""
    kind = OffsetRMSNorm if settings.norm == "rmsnorm-offset" else RMSNorm
    return kind(width, eps=eps)
