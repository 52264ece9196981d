"""CUDA's autocast for CPU tensors: which operation casts its arguments to what, where it differs from the CPU's.

The lists are PyTorch's own (`ATen/autocast_mode.h`, and `autocast_mode.cpp` for what is only CUDA's); a test holds them
against what this PyTorch has registered for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.library import fallthrough_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from bptool.instruments.dispatch import aten_names, has_kernel, operator, standing_in


def _words(text: str) -> list[str]:
    return text.split()


LOWER_PRECISION = _words(
    """
    _convolution _convolution.deprecated _scaled_dot_product_flash_attention _thnn_fused_gru_cell
    _thnn_fused_lstm_cell addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution cudnn_convolution
    cudnn_convolution_transpose einsum gru_cell linalg_multi_dot linalg_vecdot linear lstm_cell matmul mm mv
    prelu rnn_relu_cell rnn_tanh_cell scaled_dot_product_attention
    """
)
"""Their floating arguments, but for float64, become autocast's dtype; a parameter's cast is kept until the end."""

FLOAT32 = _words(
    """
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss
    cosine_similarity dist erfinv exp expm1 frobenius_norm.dim group_norm hinge_embedding_loss huber_loss kl_div
    l1_loss layer_norm log log10 log1p log2 logsumexp margin_ranking_loss mse_loss multi_margin_loss
    multilabel_margin_loss native_layer_norm nll_loss nll_loss2d nuclear_norm nuclear_norm.dim pdist
    poisson_nll_loss pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal renorm rms_norm rsqrt sinh
    smooth_l1_loss soft_margin_loss softplus tan triplet_margin_loss upsample_bicubic2d upsample_bilinear2d
    upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
    """
)
"""Their floating arguments become float32."""

FLOAT32_RESULT = _words(
    """
    cumprod cumprod.dimname cumsum cumsum.dimname linalg_matrix_norm linalg_matrix_norm.str_ord
    linalg_vector_norm log_softmax.Dimname log_softmax.int prod prod.dim_Dimname prod.dim_int softmax.Dimname
    softmax.int sum sum.dim_DimnameList sum.dim_IntList
    """
)
"""Their `dtype` argument becomes float32 where it is not given."""

FLOAT32_NORM = {
    "norm.Scalar": "norm.ScalarOpt_dtype",
    "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype",
    "norm.names_ScalarOpt_dim": "norm.names_ScalarOpt_dim_dtype",
}
"""They become the overload that takes a dtype, which is float32."""

WIDEST = _words("addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot")
"""Their floating arguments become the widest dtype among them and autocast's."""

REFUSED = ["binary_cross_entropy"]

_KEY = "AutocastCPU"


@contextmanager
def autocasting_as_cuda() -> Iterator[None]:
    """While entered, `torch.autocast("cpu")` casts what `torch.autocast("cuda")` would."""
    casts = _Casts()
    # PyTorch says through this function, and no other way, that the outermost autocast has ended.
    clearing = patch.object(torch, "clear_autocast_cache", casts.clearing(torch.clear_autocast_cache))
    with standing_in(list(_kernels(casts))), clearing:
        yield


def _kernels(casts: _Casts) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Everything that the CPU's autocast does in another way."""
    # What both cast to autocast's dtype is left to the CPU's own.
    own_lower = [name for name in LOWER_PRECISION if not has_kernel(name, _KEY)]
    policies = [(own_lower, casts.lower_precision), (FLOAT32, _float32), (FLOAT32_RESULT, _float32_result)]
    policies += [(list(FLOAT32_NORM), _float32_norm), (WIDEST, _widest), (REFUSED, _refused)]
    replaced = {name: policy for names, policy in policies for name in names if has_kernel(name, "AutocastCUDA")}
    for name, policy in replaced.items():
        yield name, _KEY, policy(name)
    for name in aten_names():
        if has_kernel(name, _KEY) and name not in replaced and name not in LOWER_PRECISION:
            yield name, _KEY, fallthrough_kernel


class _Casts:
    """Autocast's cache: a parameter that is used twice is cast once."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def clearing(self, clear: Callable[[], None]) -> Callable[[], None]:
        def clear_autocast_cache() -> None:
            clear()
            self._kept.clear()

        return clear_autocast_cache

    def lower_precision(self, name: str) -> Callable[..., Any]:
        op = operator(name)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype("cpu")
            args, kwargs = tree_map_only(Tensor, lambda tensor: self._cast(tensor, dtype), (args, kwargs))
            return _call(op, args, kwargs)

        return kernel

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        parameter = tensor.requires_grad and tensor.is_leaf and not tensor._is_view() and tensor.dtype == torch.float32
        if not (parameter and torch.is_autocast_cache_enabled()):
            return _cast(tensor, dtype)
        kept = self._kept.get(id(tensor))
        if kept is None:
            kept = self._kept[id(tensor)] = (tensor, _cast(tensor, dtype))
        return kept[1]


def _float32(name: str) -> Callable[..., Any]:
    op = operator(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda tensor: _cast(tensor, torch.float32), (args, kwargs))
        return _call(op, args, kwargs)

    return kernel


def _float32_result(name: str) -> Callable[..., Any]:
    op = operator(name)
    position = [argument.name for argument in op._schema.arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = args[position] if position < len(args) else kwargs.get("dtype")
        if given is None and _is_eligible(args[0]):
            args, kwargs = args[:position], {**kwargs, "dtype": torch.float32}
        return _call(op, args, kwargs)

    return kernel


def _float32_norm(name: str) -> Callable[..., Any]:
    op, with_dtype = operator(name), operator(FLOAT32_NORM[name])
    defaults = [2, None, False][: len(with_dtype._schema.arguments) - 2]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if not _is_eligible(args[0]):
            return _call(op, args, kwargs)
        given = [*args[1:], *kwargs.values()]
        return _call(with_dtype, (args[0], *given, *defaults[len(given) :]), {"dtype": torch.float32})

    return kernel


def _widest(name: str) -> Callable[..., Any]:
    op = operator(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and _is_eligible(leaf)]
        wide = any(tensor.dtype == torch.float32 for tensor in tensors)
        dtype = torch.float32 if wide else torch.get_autocast_dtype("cpu")
        args, kwargs = tree_map_only(Tensor, lambda tensor: _cast(tensor, dtype), (args, kwargs))
        return _call(op, args, kwargs)

    return kernel


def _refused(name: str) -> Callable[..., Any]:
    def kernel(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError(f"CUDA's autocast refuses {name}, which overflows in half precision; use the loss on logits")

    return kernel


def _is_eligible(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if _is_eligible(tensor) else tensor


def _call(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.autocast("cpu", enabled=False):
        return op(*args, **kwargs)
