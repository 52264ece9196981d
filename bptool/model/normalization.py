"""Normalisation of the last dimension: LayerNorm, RMSNorm (Zhang and Sennrich 2019), or none."""

from __future__ import annotations

from torch import Tensor, nn

from bptool.config.schema import ModelSettings


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight`, in the weight's precision or better."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        # Under autocast a linear layer's output is narrower than the weight; torch's kernel wants the two alike.
        return super().forward(x.to(self.weight.dtype))


def make_norm(settings: ModelSettings) -> nn.Module:
    """The normalisation of the residual stream that `settings.norm` names."""
    match settings.norm:
        case "layernorm":
            return nn.LayerNorm(settings.d_model, eps=settings.norm_eps, bias=settings.bias)
        case "rmsnorm":
            return RMSNorm(settings.d_model, eps=settings.norm_eps)
        case "none":
            return nn.Identity()
