"""A matrix product in which each group of rows has a matrix of its own: what a mixture of experts needs.

The rows lie group after group, and `ends_E` says where each group ends. How many rows a group has changes no shape, so
the product runs on fake tensors and on `meta`. It is an operator of its own because `torch.nn.functional.grouped_mm`
takes float32 on a CPU, but neither on fake tensors nor on `meta`, and float64 nowhere (PyTorch 2.11 to 2.13,
`meta_grouped_mm`).

Shapes: M rows of all groups, E groups, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times its group's matrix, transposed, as a linear layer does: [M, O].

    Args:
        x_MI: the rows, sorted by group.
        weight_EOI: in the dtype of the rows; autocast is the caller's to follow.
        ends_E: int32, the number of rows in a group and all those before it; the last is M.
    """
    product: Tensor = torch.ops.bptool.grouped_linear(x_MI, weight_EOI, ends_E)
    return product


@torch.library.custom_op("bptool::grouped_linear", mutates_args=())
def _grouped_linear(x_MI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    if _has_kernel(x_MI, weight_EOI):
        return F.grouped_mm(x_MI, weight_EOI.mT, offs=ends_E)
    y_MO = x_MI.new_empty(x_MI.shape[0], weight_EOI.shape[1])
    for group, rows in _groups(ends_E):
        torch.mm(x_MI[rows], weight_EOI[group].mT, out=y_MO[rows])
    return y_MO


@torch.library.custom_op("bptool::grouped_outer", mutates_args=())
def _grouped_outer(y_MO: torch.Tensor, x_MI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Each group's `y^T x`: [E, O, I]; 0 for a group without rows."""
    if _has_kernel(x_MI, y_MO):
        return F.grouped_mm(y_MO.mT, x_MI, offs=ends_E)
    found_EOI = x_MI.new_empty(ends_E.shape[0], y_MO.shape[1], x_MI.shape[1])
    for group, rows in _groups(ends_E):
        torch.mm(y_MO[rows].mT, x_MI[rows], out=found_EOI[group])
    return found_EOI


def _groups(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group's number and rows; the ends are read once, which waits for the device."""
    start = 0
    for group, end in enumerate(ends_E.tolist()):
        yield group, slice(start, end)
        start = end


def _has_kernel(*operands: Tensor) -> bool:
    """Whether PyTorch has one kernel for all groups: CUDA from Ampere on, in bfloat16, with rows of whole 16 bytes."""
    fitting = (x.is_cuda and x.dtype == torch.bfloat16 and not any(n % 8 for n in x.shape[1:]) for x in operands)
    return all(fitting) and torch.cuda.get_device_capability(operands[0].device) >= (8, 0)


@_grouped_linear.register_fake
def _(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], weight_EOI.shape[1])


@_grouped_outer.register_fake
def _(y_MO: Tensor, x_MI: Tensor, ends_E: Tensor) -> Tensor:
    return x_MI.new_empty(ends_E.shape[0], y_MO.shape[1], x_MI.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, slope_MO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_MI, weight_EOI, ends_E = ctx.saved_tensors
    x_wanted, weight_wanted, _ = ctx.needs_input_grad
    slope_MO = slope_MO.contiguous()
    x_slope_MI = grouped_linear(slope_MO, weight_EOI.mT, ends_E) if x_wanted else None
    weight_slope_EOI = torch.ops.bptool.grouped_outer(slope_MO, x_MI, ends_E) if weight_wanted else None
    return x_slope_MI, weight_slope_EOI, None


_grouped_linear.register_autograd(_backward, setup_context=_keep)

GROUPED_LINEAR: torch._ops.OpOverload = torch.ops.bptool.grouped_linear.default
"""The operation, as PyTorch's dispatcher names it."""


@register_flop_formula(torch.ops.bptool.grouped_linear)
def _linear_flops(x: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **out: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.bptool.grouped_outer)
def _outer_flops(y: tuple[int, ...], x: tuple[int, ...], *rest: Any, **out: Any) -> int:
    return 2 * y[0] * y[1] * x[1]
