"""The feed-forward branch of a block: two linear layers and a non-linearity, or three and a gate.

Shapes: B batch, T tokens, D model width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from bptool.config.schema import ModelSettings
from bptool.model.autocast import cast_once

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swiglu": F.silu,
    "geglu-tanh": partial(F.gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """`down(f(up(x)))`; where it is gated, as swiglu is, `down(f(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, settings: ModelSettings, d_ff: int) -> None:
        super().__init__()
        d_model, bias = settings.d_model, settings.bias
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if settings.gated else None
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)
        self.activation = activation(settings)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        if self.gate is None:
            inner_BTF = self.activation(self.up(x_BTD))
        else:
            gate_BTD, up_BTD = cast_once(x_BTD, 2)
            inner_BTF = self.activation(self.gate(gate_BTD)) * self.up(up_BTD)
        y_BTD: Tensor = self.down(inner_BTF)
        return y_BTD


def activation(settings: ModelSettings) -> Callable[[Tensor], Tensor]:
    """The non-linearity; where the feed-forward is gated, the gate's."""
    return _ACTIVATIONS[settings.activation]
