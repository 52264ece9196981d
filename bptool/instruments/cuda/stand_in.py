"""CPU tensors that behave as CUDA's would, so that a step on a GPU can be simulated on a machine without one.

Fake tensors on device `cuda` cannot run a backward without a GPU, so fake CPU tensors stand in for them, and the
dispatcher is told to do with these what it would do with CUDA's, wherever that changes a tensor that is kept:

    autocast                       CUDA's lists of what is cast to what
    dropout                        one fused operation with a boolean mask, where the CPU keeps float noise
    softmax, log_softmax           from half precision to float32 without a float32 copy of the input
    scaled_dot_product_attention   cuDNN, flash, efficient or written out, by GPU, dtype and shape
    rms_norm                       one fused operation that keeps one number for each row
    layer_norm                     statistics in float32

Everything else that a training step uses decomposes alike on both (compared by PyTorch's dispatch tables).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bptool.gpus import Gpu
from bptool.hardware import standing_in_for_cuda_tensors
from bptool.instruments.cuda.attention import Call, attend
from bptool.instruments.cuda.autocast import autocasting_as_cuda
from bptool.instruments.dispatch import below_autograd, standing_in
from bptool.training.operation_mode import OperationMode

_aten = torch.ops.aten
_NORMALISATIONS = frozenset(
    (_aten.native_layer_norm.default, _aten.native_group_norm.default, _aten._fused_rms_norm.default)
)
_KEY = "AutogradCPU"  # these are made of other operations, or differentiated here


@contextmanager
def standing_in_for_cuda(gpu: Gpu) -> Iterator[None]:
    """While entered, and only then, CPU tensors behave as tensors on `gpu` would.

    Enter it inside of `FakeTensorMode` and outside of what records operations, such as the memory ledger, which then
    sees what CUDA would run. It holds for the whole process.
    """
    with cuda_kernels(gpu), _Float32Statistics():
        yield


@contextmanager
def cuda_kernels(gpu: Gpu) -> Iterator[None]:
    """The same inside of a mode that passes each result on to `float32_statistics` itself, as another mode is slow."""
    with standing_in_for_cuda_tensors(), autocasting_as_cuda(), standing_in(_kernels(gpu)):
        yield


def float32_statistics(func: torch._ops.OpOverload, result: Any) -> Any:
    """What a normalisation keeps of each row is float32 on CUDA, whatever the input; a CPU keeps the input's dtype."""
    if func not in _NORMALISATIONS:
        return result
    output, *statistics = result
    return output, *(s.float() if s.dtype in (torch.float16, torch.bfloat16) else s for s in statistics)


def _kernels(gpu: Gpu) -> list[tuple[str, str, Callable[..., Any]]]:
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return attend(Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa), gpu)

    return [
        ("scaled_dot_product_attention", _KEY, scaled_dot_product_attention),
        ("dropout", _KEY, _dropout),
        ("softmax.int", _KEY, _softmax_as(_aten._softmax.default)),
        ("log_softmax.int", _KEY, _softmax_as(_aten._log_softmax.default)),
        ("_fused_rms_norm", _KEY, _FusedRMSNorm.apply),
    ]


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    if p == 0 or not train or x.numel() == 0:
        return x
    if p == 1:
        return x * torch.zeros((), dtype=x.dtype)
    dropped: Tensor = _aten.native_dropout(x, p, train)[0]
    return dropped


def _softmax_as(op: torch._ops.OpOverload) -> Callable[..., Tensor]:
    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        # Only float16: CUDA's kernel could do bfloat16 too, but is not asked to (SoftMax.cpp).
        straight = x.dtype == torch.float16 and dtype == torch.float32
        result: Tensor = op(x if straight or dtype is None else x.to(dtype), dim, straight)
        return result

    return softmax


class _FusedRMSNorm(torch.autograd.Function):
    """The derivative that PyTorch gives CUDA's `_fused_rms_norm`, which on a CPU is made of other operations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            y, reciprocal_rms = _aten._fused_rms_norm(x, shape, weight, eps)
        ctx.save_for_backward(x, weight, reciprocal_rms)
        ctx.mark_non_differentiable(reciprocal_rms)
        ctx.set_materialize_grads(False)  # it would allocate zeros for the row's number
        ctx.shape = shape
        return y, reciprocal_rms

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight, reciprocal_rms = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        x_grad, weight_grad = _aten._fused_rms_norm_backward(gradients[0], x, ctx.shape, reciprocal_rms, weight, wanted)
        return x_grad, None, weight_grad, None


class _Float32Statistics(OperationMode):
    """Passes every result on to `float32_statistics`."""

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return float32_statistics(func, func(*args, **(kwargs or {})))
