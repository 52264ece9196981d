"""Which kernel CUDA's scaled-dot-product attention runs, and the preparations around it.

The rules are those of PyTorch's `sdp_utils.cpp` and `attention.cpp` (2.11 to 2.13, with the cuDNN 9.19 and 9.20 that
their CUDA 13 wheels bring). Nested tensors and AMD's kernels are left out.

Shapes: B batch, H query heads, K key and value heads, T queries, S keys, Q head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bptool.gpus import Gpu

Backend = Literal["cudnn", "flash", "efficient", "math"]

_aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """The arguments of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def differentiates(self) -> bool:
        """Whether a backward will follow."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.query, self.key, self.value))

    @property
    def dtype(self) -> torch.dtype | None:
        """All three's, or None where they differ."""
        dtypes = {self.query.dtype, self.key.dtype, self.value.dtype}
        return dtypes.pop() if len(dtypes) == 1 else None


def chosen_backend(call: Call, gpu: Gpu) -> Backend:
    """The first kernel, in CUDA's order for this GPU, that takes these arguments and is not switched off.

    Raises:
        RuntimeError: every kernel that could is switched off.
    """
    cuda = torch.backends.cuda
    order: list[tuple[Backend, bool]] = [
        ("flash", cuda.flash_sdp_enabled() and _flash_takes(call, gpu)),
        ("efficient", cuda.mem_efficient_sdp_enabled() and _efficient_takes(call, gpu)),
        ("math", cuda.math_sdp_enabled()),
    ]
    cudnn: tuple[Backend, bool] = ("cudnn", cuda.cudnn_sdp_enabled() and _cudnn_takes(call, gpu))
    # Hopper and the first Blackwells prefer cuDNN; elsewhere it comes after the rest, which with math on is never.
    order.insert(0 if gpu.capability[0] in (9, 10) else len(order), cudnn)
    for backend, takes in order:
        if takes:
            return backend
    raise RuntimeError("No available kernel. Aborting execution.")  # PyTorch's own words


def attend(call: Call, gpu: Gpu) -> Tensor:
    """[B, H, T, Q], by the kernel that CUDA would choose."""
    match chosen_backend(call, gpu):
        case "cudnn":
            return _cudnn(call)
        case "flash":
            return _flash(call)
        case "efficient":
            return _efficient(call)
        case "math":
            return _math(call)


def _cudnn(call: Call) -> Tensor:
    result = _aten._scaled_dot_product_cudnn_attention(
        call.query,
        call.key,
        call.value,
        _additive(call.mask, call.query.dtype),
        call.differentiates,
        call.dropout,
        call.is_causal,
        scale=call.scale,
    )
    output: Tensor = result[0]
    return output


def _flash(call: Call) -> Tensor:
    width = call.query.shape[-1]
    scale = call.scale if call.scale is not None else 1 / math.sqrt(width)
    padding = -width % 8
    q, k, v = (F.pad(t, [0, padding]) if padding else t for t in (call.query, call.key, call.value))
    output: Tensor = _aten._scaled_dot_product_flash_attention(q, k, v, call.dropout, call.is_causal, scale=scale)[0]
    return output[..., :width] if padding else output


def _efficient(call: Call) -> Tensor:
    mask = _additive(call.mask, call.query.dtype)
    if mask is not None:
        mask = _aligned(mask.expand(*call.query.shape[:3], call.key.shape[2]))
    result = _aten._scaled_dot_product_efficient_attention(
        call.query, call.key, call.value, mask, call.differentiates, call.dropout, call.is_causal, scale=call.scale
    )
    output: Tensor = result[0]
    return output


def _math(call: Call) -> Tensor:
    result = _aten._scaled_dot_product_attention_math(
        call.query,
        call.key,
        call.value,
        _additive(call.mask, call.query.dtype),
        call.dropout,
        call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )
    output: Tensor = result[0]
    return output


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask as what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.full((), -torch.inf, dtype=dtype))


def _aligned(mask_BHTS: Tensor) -> Tensor:
    """Each row begins at a multiple of 16 elements, as the efficient kernel's loads need."""
    n_keys = mask_BHTS.shape[-1]
    if n_keys % 16:
        return F.pad(mask_BHTS, [0, -n_keys % 16])[..., :n_keys]
    return mask_BHTS.contiguous() if any(stride % 16 for stride in mask_BHTS.stride()[:3]) else mask_BHTS


def _flash_takes(call: Call, gpu: Gpu) -> bool:
    head_dims = {t.shape[-1] for t in (call.query, call.key, call.value)}
    square = call.query.shape[-2] == call.key.shape[-2]
    return (
        _is_dense(call, gqa=True)
        and gpu.capability >= (8, 0)
        and call.dtype in _HALVES
        and call.mask is None
        and len(head_dims) == 1
        and max(head_dims) <= 256
        and (square or not call.is_causal)
        and not (call.differentiates and _is_small_sm8(gpu) and _too_wide_for_small_sm8(call))
    )


def _is_small_sm8(gpu: Gpu) -> bool:
    """Less shared memory than the A100: the 8.6 to 8.9 and 12.x GPUs."""
    return (8, 6) <= gpu.capability <= (8, 9) or gpu.capability[0] == 12


def _too_wide_for_small_sm8(call: Call) -> bool:
    width = call.query.shape[-1]
    return width > 192 and (width <= 224 or call.dropout > 0)


def _efficient_takes(call: Call, gpu: Gpu) -> bool:
    dtypes = (*_HALVES, torch.float32) if gpu.capability >= (8, 0) else (torch.float16, torch.float32)
    q_width, k_width, v_width = (t.shape[-1] for t in (call.query, call.key, call.value))
    alignment = _gemm_alignment(call, gpu)
    return (
        _is_dense(call, gqa=False)
        and call.dtype in dtypes
        and q_width == k_width
        and q_width % alignment == 0
        and v_width % alignment == 0
    )


def _gemm_alignment(call: Call, gpu: Gpu) -> int:
    """Elements of a head that CUTLASS's loads take at once."""
    half = call.query.dtype in _HALVES
    tensor_cores = gpu.capability >= (8, 0) or half
    return max(4 if gpu.capability >= (8, 0) else 1, (8 if half else 4) if tensor_cores else 1)


def _cudnn_takes(call: Call, gpu: Gpu) -> bool:
    widths = (call.query.shape[-1], call.value.shape[-1])
    n_queries, n_keys = call.query.shape[-2], call.key.shape[-2]
    return (
        _is_dense(call, gqa=True)
        and gpu.capability >= (8, 0)
        and call.dtype in _HALVES
        and (call.dropout * 16).is_integer()
        and max(widths) <= 128
        and all(width % 8 == 0 for width in widths)
        and n_keys != 1
        and not (call.dropout and n_queries == 1)
        and _cudnn_takes_mask(call)
    )


def _cudnn_takes_mask(call: Call) -> bool:
    if call.mask is None:
        return True
    if call.mask.requires_grad or call.mask.dim() not in (2, 4):
        return False
    wanted = (*call.query.shape[:3], call.key.shape[2])[-call.mask.dim() :]
    return all(size in (1, full) for size, full in zip(call.mask.shape, wanted, strict=True))


def _is_dense(call: Call, *, gqa: bool) -> bool:
    """What every fused kernel asks for: four dimensions, equal batches, whole rows, and heads that match or group."""
    tensors = (call.query, call.key, call.value)
    if any(t.dim() != 4 for t in tensors) or len({t.shape[0] for t in tensors}) > 1:
        return False
    if 0 in (call.query.shape[-2], call.key.shape[-2]):
        return False
    heads, k_heads, v_heads = (t.shape[1] for t in tensors)
    heads_fit = k_heads == v_heads and heads % k_heads == 0 if gqa and call.enable_gqa else heads == k_heads == v_heads
    rows = (*tensors, call.mask) if call.mask is not None else tensors
    return heads_fit and all(t.stride(-1) == 1 for t in rows)
