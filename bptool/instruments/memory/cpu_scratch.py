"""What a CPU's kernels take for themselves during one operation, besides the operation's results.

For ATen's own kernels there are closed forms, true of every size and CPU, each from a file of PyTorch's sources:

    numbers, mixed dtypes   copies in the dtype that is computed in             TensorIterator.cpp
    other layouts           contiguous copies of what is strided or expanded    each kernel's `.contiguous()`
    attention               a block of weights for each thread                  cpu/FlashAttentionKernel.cpp
    layer norm              sums of each thread                                 cpu/layer_norm_kernel.cpp

What oneDNN takes follows from the CPU's instructions and its caches: that is tried out (`kernel_probe`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bptool.instruments.kernel_probe import try_out

Rule = Callable[[tuple[Any, ...], Any], int]
"""Bytes, from an operation's positional arguments and its result."""

_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "isclose"}
_UNPROMOTED = {"_to_copy", "copy_", "clone", "where", "masked_fill", "masked_fill_", "fill_", "fill", "_conj"}
_DTYPES_OF_NUMBERS = {bool: torch.bool, int: torch.int64, complex: torch.complex64}
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_BLOCK = 60  # side of the block in which a transposed matrix is copied, Copy.cpp
_GRAIN = 32768  # elements that are worth a thread, TensorIterator.h


class CpuScratch:
    """Bytes of scratch of one operation, as a memory ledger asks for them.

    Attributes:
        uncounted: operations whose kernel takes something that was not counted: too large to try out.
    """

    def __init__(self) -> None:
        self.uncounted: set[str] = set()

    def __call__(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        """For its arguments and its result, real or fake."""
        name = func.overloadpacket.__name__
        if name in _UNKNOWN:
            self.uncounted.add(name)
        if _is_tried_out(name, args):
            tried = try_out(func, args, kwargs, result)
            if tried is not None:
                return tried
            self.uncounted.add(name)
        rule = _rule(func)
        return rule(args, result) if rule else 0


def _is_tried_out(name: str, args: tuple[Any, ...]) -> bool:
    if name in _TRIED_OUT:
        return True
    return name in _TRIED_OUT_IF_LOW and any(isinstance(a, Tensor) and a.dtype in _LOW_PRECISION for a in args)


@functools.cache
def _rule(func: torch._ops.OpOverload) -> Rule | None:
    name = func.overloadpacket.__name__
    if name in _RULES:
        return _RULES[name]
    if name.startswith("_foreach_"):
        scalar = "Scalar" in func._overloadname and name.removeprefix("_foreach_").rstrip("_") in _WRAPPING
        return _foreach_numbers if scalar else None
    if torch.Tag.pointwise in func.tags and name not in _UNPROMOTED:
        wraps = _wraps_numbers(func)
        return functools.partial(_promotions, name in _COMPARISONS, name.endswith("_"), wraps)
    return None


_WRAPPING = {"add", "sub", "mul", "div", "rsub", "remainder", "fmod", "floor_divide", "bitwise_and", "bitwise_or"}


def _wraps_numbers(func: torch._ops.OpOverload) -> tuple[bool, ...]:
    """For each argument, whether a number there becomes a tensor of no dimension."""
    name = func.overloadpacket.__name__.rstrip("_")
    base = func.overloadpacket is torch.ops.aten.pow  # `2 ** x`; an exponent is no tensor
    scalar = func._overloadname == "Scalar" and (name in _WRAPPING or name in _COMPARISONS or base)
    return tuple(
        "Tensor" in str(argument.type) or (scalar and i < 2) for i, argument in enumerate(func._schema.arguments)
    )


def _promotions(compares: bool, in_place: bool, wraps: tuple[bool, ...], args: tuple[Any, ...], result: Any) -> int:
    """What is not of the dtype that is computed in is copied to it first, an in-place result too."""
    operands = [a for a, wrapped in zip(args, wraps, strict=False) if wrapped and a is not None]
    first = operands[0] if operands else None
    if all(isinstance(a, Tensor) and a.dtype == first.dtype for a in operands) and (  # type: ignore[union-attr]
        compares or result is None or not isinstance(result, Tensor) or result.dtype == first.dtype  # type: ignore[union-attr]
    ):
        return 0
    common = _common_dtype(operands) if compares or in_place or not isinstance(result, Tensor) else result.dtype
    n_bytes = sum(_operand_bytes(a, common) for a in operands)
    if in_place and isinstance(first, Tensor) and first.dtype != common:
        n_bytes += first.numel() * common.itemsize
    return n_bytes


def _common_dtype(operands: list[Any]) -> torch.dtype:
    """As `torch.result_type`, which would run on fake tensors: what has dimensions decides, then what has none."""
    with_dimensions = [a.dtype for a in operands if isinstance(a, Tensor) and a.ndim]
    without = [a.dtype for a in operands if isinstance(a, Tensor) and not a.ndim]
    numbers = [
        _DTYPES_OF_NUMBERS.get(type(a), torch.get_default_dtype()) for a in operands if not isinstance(a, Tensor)
    ]
    common: torch.dtype | None = None
    for dtypes in (with_dimensions, without, numbers):
        if not dtypes:
            continue
        dtype = functools.reduce(torch.promote_types, dtypes)
        if common is None or _kind(dtype) > _kind(common):
            common = dtype if common is None else torch.promote_types(common, dtype)
    assert common is not None, "an operation on nothing"
    return common


def _kind(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 1 if dtype != torch.bool else 0


def _operand_bytes(operand: Any, common: torch.dtype) -> int:
    if isinstance(operand, Tensor):
        return 0 if operand.dtype == common else operand.numel() * common.itemsize
    return _number_bytes(operand, common)


def _number_bytes(number: Any, common: torch.dtype) -> int:
    """A number is a tensor of its own dtype, and a second one of the common dtype where that is another."""
    own = {bool: torch.bool, int: torch.int64, float: torch.float64}.get(type(number), torch.complex128)
    return own.itemsize + (0 if own == common else common.itemsize)


def _foreach_numbers(args: tuple[Any, ...], result: Any) -> int:
    """One tensor after another."""
    numbers = args[1] if isinstance(args[1], list | tuple) else [args[1]]
    return max((_number_bytes(numbers[0], tensor.dtype) for tensor in args[0]), default=0)


def _copied(*tensors: Tensor | None) -> int:
    """Those that are not contiguous are copied, one after the other."""
    copies = highest = 0
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            copies += tensor.numel() * tensor.dtype.itemsize
            highest = max(highest, copies + _block_bytes(tensor))
    return highest


def _block_bytes(source: Tensor) -> int:
    """A transposed matrix is copied block by block."""
    rows_first = source.ndim == 2 and source.stride(0) == 1 and source.stride(1) == source.shape[0]
    n_bytes: int = _BLOCK**2 * source.dtype.itemsize
    return n_bytes if rows_first and source.numel() >= _BLOCK**2 else 0


def _copy(target: Tensor, source: Tensor) -> int:
    return _block_bytes(source) if target.is_contiguous() and target.dtype == source.dtype else 0


def _mean(args: tuple[Any, ...], result: Tensor) -> int:
    """A sum, divided in place by a number; in low precision of float32 copies."""
    if result.dtype not in _LOW_PRECISION:
        return max(_number_bytes(1, result.dtype), _sums_of_threads(args[0], result, result.dtype))
    operand = 4 * args[0].numel() + _sums_of_threads(args[0], result, torch.float32)
    total: int = 4 * result.numel() + max(operand, _number_bytes(1, torch.float32))
    return total


def _reduced(args: tuple[Any, ...], result: Tensor) -> int:
    """A reduction's operand is copied to the dtype of its result."""
    return _cast(args, result) + _sums_of_threads(args[0], result, result.dtype)


def _sums_of_threads(operand: Tensor, result: Tensor, dtype: torch.dtype) -> int:
    """Threads reduce parts of what becomes one number."""
    n_threads = torch.get_num_threads()
    in_parts = n_threads > 1 and result.numel() == 1 and operand.numel() >= _GRAIN
    return n_threads * dtype.itemsize if in_parts else 0


def _cast(args: tuple[Any, ...], result: Tensor) -> int:
    operand: Tensor = args[0]
    return 0 if operand.dtype == result.dtype else operand.numel() * result.dtype.itemsize


def _product(left: Tensor, right: Tensor) -> int:
    """BLAS takes rows or columns that are a whole stride apart; other operands are copied."""
    return sum(m.numel() * m.dtype.itemsize for m in (left, right) if not _suits_blas(m))


def _suits_blas(matrix: Tensor) -> bool:
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    return (down == 1 and across >= max(1, rows)) or (across == 1 and down >= max(1, columns))


def _embedding(args: tuple[Any, ...], result: Tensor) -> int:
    """The indices are copied before the result is there."""
    indices: Tensor = args[1]
    copy = 0 if indices.is_contiguous() else indices.nbytes
    return max(copy, _copied(indices) - result.nbytes)


def _drawn(args: tuple[Any, ...], result: Tensor) -> int:
    """Zeros and ones; on Intel's CPUs oneMKL draws them as int32 first (DistributionKernels.cpp)."""
    return result.numel() * _bytes_of_a_draw()


@functools.cache
def _bytes_of_a_draw() -> int:
    sample = torch.empty(1000)
    return (try_out(torch.ops.aten.bernoulli_.float, (sample, 0.5), {}, sample) or 0) // len(sample)


def _safe_softmax(args: tuple[Any, ...], result: Tensor) -> int:
    """Which elements are -inf, and which rows hold nothing else; then a number to fill those with."""
    rows: int = result.numel() // max(result.shape[args[1]], 1)
    return result.numel() + rows + result.dtype.itemsize


def _layer_norm_backward(args: tuple[Any, ...], result: Any) -> int:
    gradient, x = args[:2]
    scale = next((r for r in result[1:] if r is not None), None)
    sums = 0 if scale is None else 2 * torch.get_num_threads() * scale.numel() * scale.dtype.itemsize
    return sums + _copied(gradient, x)


def _attention_blocks(queries: Tensor, keys: Tensor) -> tuple[int, int]:
    """Rows and columns of the weights that a thread holds at once."""
    n_queries, n_keys = queries.shape[2], keys.shape[2]
    block = 256 if n_queries >= 768 else 64 if n_queries >= 192 else 32
    return min(block, n_queries), min(512, n_keys)


def _attention(args: tuple[Any, ...], result: Any) -> int:
    queries, keys = args[:2]
    rows, columns = _attention_blocks(queries, keys)
    exact = torch.promote_types(queries.dtype, torch.float32).itemsize
    low = rows * columns * queries.dtype.itemsize if queries.dtype in _LOW_PRECISION else 0
    n_bytes: int = torch.get_num_threads() * (rows * (columns + 2 + queries.shape[3]) * exact + low)
    return n_bytes


def _attention_backward(args: tuple[Any, ...], result: Any) -> int:
    gradient, queries, keys = args[:3]
    rows, columns = _attention_blocks(queries, keys)
    exact = torch.promote_types(queries.dtype, torch.float32).itemsize
    low = queries.dtype.itemsize if queries.dtype in _LOW_PRECISION else 0
    # Of the sums of rows the profiler sees its own thread's alone.
    return (
        torch.get_num_threads() * 2 * rows * columns * (exact + low) + rows * exact + _copied(gradient.transpose(1, 2))
    )


_RULES: dict[str, Rule] = {
    "mean": _mean,
    "sum": _reduced,
    "prod": _reduced,
    "cumsum": _cast,
    "copy_": lambda args, result: _copy(args[0], args[1]),
    "clone": lambda args, result: _copy(result, args[0]),
    "mm": lambda args, result: _product(args[0], args[1]),
    "addmm": lambda args, result: _product(args[1], args[2]),
    "_safe_softmax": _safe_softmax,
    "_softmax": lambda args, result: _copied(args[0]),
    "_log_softmax": lambda args, result: _copied(args[0]),
    "bernoulli_": _drawn,
    "embedding": _embedding,
    "embedding_dense_backward": lambda args, result: _copied(args[1], args[0]),
    "native_layer_norm": lambda args, result: _copied(args[0]),
    "native_layer_norm_backward": _layer_norm_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
_UNKNOWN = {"mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"}  # a workspace that fake tensors have no size of
_TRIED_OUT = {
    *("convolution", "convolution_backward"),
    *("native_batch_norm", "native_batch_norm_backward"),
}
_TRIED_OUT_IF_LOW = {
    *("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "sum"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
}
