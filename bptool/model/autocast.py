"""What autocast makes of a product's operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product of `x` has here; autocast leaves float64 alone."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def cast_once(x: Tensor, uses: int) -> tuple[Tensor, ...]:
    """`x` for each of so many matrix products, which share one copy where autocast would make each its own.

    Values and gradients are autocast's to the bit: each product's gradient is raised to the dtype of `x` and added, the
    last product's first, as autograd does it. One plain cast would add them in low precision.
    """
    dtype = matmul_dtype(x)
    if dtype == x.dtype:
        return (x,) * uses
    shared: tuple[Tensor, ...] = _CastOnce.apply(x, dtype, uses)  # type: ignore[no-untyped-call]
    return shared


class _CastOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, uses: int) -> tuple[Tensor, ...]:
        ctx.dtype = x.dtype
        first = x.to(dtype)
        return (first, *(first.view_as(first) for _ in range(uses - 1)))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        total = slopes[-1].to(ctx.dtype)
        for slope in reversed(slopes[:-1]):
            total += slope
        return total, None, None
