"""What CUDA holds that no tensor of the step shows: kernels' own buffers, cuBLAS's workspaces.

Each formula names the file of PyTorch (2.11 to 2.13) that it was read in. Left out, as small or unknown: the partial
sums of reductions that are split over blocks and of layer_norm's backward (KiB), sorting outside of embeddings,
convolutions' workspaces, what cuDNN's own engines ask for beyond the graph, deterministic algorithms.

Shapes: B batch, H query heads, K key and value heads, T queries, S keys, Q head width, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from bptool.gpus import Gpu
from bptool.instruments.memory.ledger import Scratch
from bptool.units import KIB, MIB

_aten = torch.ops.aten
_FLOAT, _INDEX = 4, 8  # bytes


def cuda_scratch(gpu: Gpu) -> Scratch:
    """What kernels on `gpu` allocate and free inside of one operation, as the memory ledger asks for it."""
    known: dict[torch._ops.OpOverload, Callable[[Sequence[Any], Gpu], int]] = {
        _aten._scaled_dot_product_flash_attention.default: _flash_forward,
        _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
        _aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
        _aten.embedding_dense_backward.default: _embedding_backward,
        _aten._foreach_norm.Scalar: _foreach_norm,
    }
    known |= dict.fromkeys((_aten.mm.default, _aten.addmm.default), _product)

    def scratch(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        count = known.get(func)
        return count(args, gpu) if count else 0

    return scratch


def cublas_workspace_bytes(gpu: Gpu) -> int:
    """What cuBLAS keeps from its first products on, through PyTorch's allocator: `memory_allocated` counts it.

    A handle's workspace is 32 MiB on Hopper (and on Blackwell since PyTorch 2.12) and `:4096:2:16:8` elsewhere
    (CublasHandlePool.cpp). Handles are a thread's own, and autograd runs the backward in a thread of its device, so
    there are two. cublasLt works in the same place (2.12), or in 1 MiB more for each (2.11), which is left out.
    """
    roomy = (9, 10, 12) if torch.__version__ >= "2.12" else (9,)
    one = 32 * MIB if gpu.capability[0] in roomy else (2 * 4096 + 8 * 16) * KIB
    return 2 * one


def _flash_forward(args: Sequence[Any], gpu: Gpu) -> int:
    """Too few blocks for the GPU are split along the keys, in float32 parts (flash_api.cpp, set_params_splitkv)."""
    query, key = args[:2]
    dropout = args[3] if len(args) > 3 else 0.0
    n_batch, heads, n_queries, width = map(int, query.shape)
    block = 256 if width <= 64 else 128 if width <= 128 else 64
    blocks = n_batch * heads * ceil(n_queries / 64)
    splits = 1 if dropout else _flash_splits(blocks, 2 * gpu.multiprocessors, ceil(key.shape[2] / block))
    rows = splits * n_batch * heads * n_queries
    return rows * (1 + _flash_width(width)) * _FLOAT if splits > 1 else 0


def _flash_splits(blocks: int, processors: int, key_blocks: int) -> int:
    """The fewest splits within 85% of the best occupancy (flash_api.cpp, num_splits_heuristic)."""
    if blocks >= 0.8 * processors:
        return 1
    eligible = [
        n
        for n in range(1, min(128, processors, key_blocks) + 1)
        if n == 1 or ceil(key_blocks / n) != ceil(key_blocks / (n - 1))
    ]
    waves = {n: blocks * n / processors for n in eligible}
    efficiency = {n: waves[n] / ceil(waves[n]) for n in eligible}
    best = max(efficiency.values())
    return next(n for n in eligible if efficiency[n] >= 0.85 * best)


def _flash_width(width: int) -> int:
    return _round_up(width, 32 if width <= 128 else 64)


def _flash_backward(args: Sequence[Any], gpu: Gpu) -> int:
    """float32 gradients of the queries and their row sums; keys' and values' gradients for each query head (mha_bwd).

    In flash_api.cpp. The kernel wants the output and its gradient contiguous as [B, T, H, Q], and copies them where
    they are not.
    """
    output_grad, query, key, _, output = args[:5]
    n_batch, heads, n_queries, width = map(int, query.shape)
    rows = n_batch * heads * _round_up(n_queries, 128)
    accumulated = rows * (1 + _flash_width(width)) * _FLOAT
    expanded = 0 if key.shape[1] == heads else 2 * n_batch * key.shape[2] * heads * width * query.element_size()
    return accumulated + expanded + _copies(output_grad, output)


def _efficient_backward(args: Sequence[Any], gpu: Gpu) -> int:
    """Row sums, and a float32 place for the queries' gradient, tile by tile (attention_backward.cu, kernel_backward.h).

    The row sums of float32 are made of a product as large as the output, before the place is allocated. Not counted: a
    place for keys' and values' gradients in half precision with heads wider than 128.
    """
    output_grad, query = args[:2]
    n_batch, heads, n_queries, width = map(int, query.shape)
    copy = _copies(output_grad)
    row_sums = n_batch * heads * n_queries * _FLOAT
    tile_rows = 64 if width <= 64 else 128
    tiles = ceil(n_queries / tile_rows) * ceil(width / 64)
    workspace = n_batch * heads * tiles * (16 + tile_rows * 64 * _FLOAT)
    in_kernel = query.dtype != torch.float32 and gpu.capability >= (7, 5)
    product = 0 if in_kernel else query.numel() * _FLOAT + row_sums
    return copy + row_sums + max(product, workspace)


def _cudnn_backward(args: Sequence[Any], gpu: Gpu) -> int:
    """float32 gradients of the queries, and row sums (cudnn-frontend's SDPA backward node, which MHA.cpp builds)."""
    query: Tensor = args[1]
    return (query.numel() + query.numel() // query.shape[-1]) * _FLOAT


def _embedding_backward(args: Sequence[Any], gpu: Gpu) -> int:
    """Sorted tokens and float32 sums of runs of at most 10 equal ones (Embedding.cu, EmbeddingBackwardKernel.cu).

    3072 tokens or fewer are not sorted. How many runs there are depends on the tokens; room is made for the most. The
    sort needs its keys and values a second time.
    """
    grad: Tensor = args[0]
    indices: Tensor = args[1]
    tokens, width = indices.numel(), grad.shape[-1]
    if tokens <= 3072:
        return 0
    segments = min(tokens, int(args[2]))
    partial = tokens // 10 + segments
    sorting = 2 * tokens * indices.element_size()
    sums = (3 * segments + partial) * indices.element_size() + partial * width * _FLOAT
    return sorting + max(sorting, sums)


def _foreach_norm(args: Sequence[Any], gpu: Gpu) -> int:
    """One float32 number for each 65,536 elements of the largest tensor, for all tensors (ForeachReduceOp.cu)."""
    tensors: Sequence[Tensor] = args[0]
    return len(tensors) * ceil(max(t.numel() for t in tensors) / 65_536) * _FLOAT


def _product(args: Sequence[Any], gpu: Gpu) -> int:
    """Contiguous copies of the factors that cuBLAS cannot read as they lie, such as an expanded gradient (Blas.cpp).

    A matrix can be read by rows or by columns, with gaps between them.
    """
    return sum(m.numel() * m.element_size() for m in args[-2:] if not (_reads(m) or _reads(m.t())))


def _reads(matrix: Tensor) -> bool:
    across, along = matrix.stride()
    return bool(along == 1 and across >= max(1, matrix.shape[1])) or matrix.is_contiguous()


def _copies(*tensors_BHTQ: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_BHTQ if not t.transpose(1, 2).is_contiguous())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
