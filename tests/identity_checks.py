"""The identities of the built-in transformer at a small size, for tests that break it; and a layer that breaks one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from small_runs import small_config
from torch import Tensor, nn

from bptool.analysis.gradcheck.identities.check import check_identities
from bptool.analysis.gradcheck.identities.identity import Identities, Identity
from bptool.training.workload import transformer_workload

NAMES = [
    "logits_gradient",
    "residual_paths",
    "attention_query_gradient",
    "attention_key_gradient",
    "attention_value_gradient",
    "layer_order",
    "accumulation",
    "activation_checkpointing",
    "clipping_norm",
    "gradient_descent_update",
]


def of_transformer(changes: dict[str, object] | None = None, seed: int = 3) -> Identities:
    config = small_config(changes)
    return check_identities(config, transformer_workload(config), built_in=True, seed=seed)


def failed(found: Identities) -> list[str]:
    return [identity.name for identity in found.identities if not identity.holds]


def named(found: Sequence[Identity], name: str) -> Identity:
    (identity,) = (identity for identity in found if identity.name == name)
    return identity


class _ReadsTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        found: Tensor = slope * ctx.saved_tensors[0] + slope * ctx.saved_tensors[0]
        return found


class SquaresOnce(nn.Module):
    """A layer whose backward reads what was saved twice: its gradient is right, and it cannot be recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return _ReadsTwice.apply(self.layer(x))  # type: ignore[no-untyped-call, no-any-return]
