"""FLOPs of the operations that multiply matrices: products, convolutions, attention, recurrent layers.

A multiply-add is two FLOPs; biases, scales and the softmax inside of attention are not counted. Attention is counted
over all T x S scores, also where a mask leaves some out. Written here rather than taken from
`torch.utils.flop_counter`, which tells nothing of which gradient is whose, does not know a CPU's attention, linear and
recurrent kernels, takes the heads of `_flash_attention_forward` for its tokens, and counts the weight gradient of a
convolution of g groups g times. What is registered there for other operations (a user's own) is used as it is.

Shapes: B batch, H query heads, T queries, S keys, Q and V widths of a head of queries and of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

Args = Sequence[Any]
Formula = Callable[[Args, Any], Sequence[int]]
"""From an operation's arguments and its result to the FLOPs of each of its results, the last ones left out if 0."""

_aten = torch.ops.aten


def flops_of(func: torch._ops.OpOverload, args: Args, kwargs: Mapping[str, Any], result: Any) -> tuple[int, ...] | None:
    """FLOPs of each result of an operation; None where it multiplies no matrices."""
    packet = func.overloadpacket
    formula = _formulas().get(packet)
    if formula is not None:
        return tuple(formula(args, result))
    registered = flop_registry.get(packet)
    return None if registered is None else (int(registered(*args, **kwargs, out_val=result)),)


def is_causal(func: torch._ops.OpOverload, args: Args, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation is an attention that is told to look at no later position; a mask may tell it so too."""
    place = _place_of_causal(func)
    if place is None:
        return False
    return bool(args[place] if place < len(args) else kwargs.get("is_causal", False))


@cache
def _place_of_causal(func: torch._ops.OpOverload) -> int | None:
    names = [argument.name for argument in func._schema.arguments]
    return names.index("is_causal") if "is_causal" in names else None


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Of `softmax(q k^T) v`, from shapes [B, H, T, Q], [B, K, S, Q] and [B, K, S, V]: two products."""
    return _score_flops(query, key) * (query[-1] + value[-1])


def attention_backward_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Of the three gradients of a fused attention: five products, as it makes the scores again (Dao et al. 2022)."""
    return _score_flops(query, key) * (3 * query[-1] + 2 * value[-1])


def _score_flops(query: Sequence[int], key: Sequence[int]) -> int:
    """Two for each score: what a product over the scores costs for each element of the other dimension."""
    return 2 * math.prod(query[:-1]) * key[-2]


def _product(a: Tensor, b: Tensor) -> int:
    """[..., M, K] x [..., K, N]."""
    return 2 * math.prod(a.shape) * b.shape[-1]


def _mm(args: Args, result: Any) -> list[int]:
    return [_product(args[0], args[1])]


def _addmm(args: Args, result: Any) -> list[int]:
    return [_product(args[1], args[2])]


def _mv(args: Args, result: Any) -> list[int]:
    return [2 * args[0].numel()]


def _addmv(args: Args, result: Any) -> list[int]:
    return [2 * args[1].numel()]


def _grouped_mm(args: Args, result: Any) -> list[int]:
    """Groups of rows, of columns, or of what is summed over; each row, column and term is in one group."""
    a, b = args[0], args[1]
    groups = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return [2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]]


def _linear(args: Args, result: Any) -> list[int]:
    return [2 * args[0].numel() * args[1].shape[0]]


def _linear_backward(args: Args, result: Any) -> list[int]:
    """Of (input, slope, weight, mask): the gradients of input, weight and bias."""
    each = 2 * args[1].numel() * args[2].shape[1]
    return [each * args[3][0], each * args[3][1]]


def _mkldnn_linear_backward_input(args: Args, result: Any) -> list[int]:
    return [2 * args[1].numel() * args[2].shape[1]]


def _mkldnn_linear_backward_weights(args: Args, result: Any) -> list[int]:
    return [2 * args[0].numel() * args[1].shape[-1]]


def _convolution(args: Args, result: Any) -> list[int]:
    """Each output position is a product with all of the weight; in a transposed one each input position."""
    x, weight = args[0], args[1]
    transposed = args[6] if len(args) > 6 and isinstance(args[6], bool) else False
    return [_convolution_flops(x if transposed else result, weight)]


def _convolution_backward(args: Args, result: Any) -> list[int]:
    """Of (slope, input, weight, ...): every multiplication of the forward is met again in each gradient."""
    slope, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
    each = _convolution_flops(x if transposed else slope, weight)
    return [each * mask[0], each * mask[1]]


def _convolution_flops(positions: Tensor, weight: Tensor) -> int:
    return 2 * weight.numel() * positions.shape[0] * math.prod(positions.shape[2:])


def _attention(args: Args, result: Any) -> list[int]:
    return [attention_flops(*(x.shape for x in args[:3]))]


def _attention_backward(args: Args, result: Any) -> list[int]:
    """The three products that lead to queries and keys, and the two that lead to keys and values, are not parted."""
    return [attention_backward_flops(*(x.shape for x in args[1:4]))]


def _heads_last(args: Args, result: Any) -> list[int]:
    """Queries [B, T, H, Q], keys and values alike."""
    return [attention_flops(*(_heads_first(x) for x in args[:3]))]


def _heads_last_backward(args: Args, result: Any) -> list[int]:
    return [attention_backward_flops(*(_heads_first(x) for x in args[1:4]))]


def _heads_first(x: Tensor) -> list[int]:
    *batch, tokens, heads, width = x.shape
    return [*batch, heads, tokens, width]


def _packed(formula: Formula, name: str, at: int) -> Formula:
    """Sequences packed one after another, whose ends are argument `at`, are for PyTorch's formula to count."""

    def flops(args: Args, result: Any) -> Sequence[int]:
        if args[at] is None:
            return formula(args, result)
        return [int(flop_registry[getattr(_aten, name)](*args, out_val=result))]

    return flops


def _rnn_layer(args: Args, result: Any) -> list[int]:
    """One layer and direction of oneDNN's: (input, weight of the input, weight of the hidden state, ...)."""
    return [2 * _rows(args[0]) * (args[1].numel() + args[2].numel())]


def _rnn_layer_backward(args: Args, result: Any) -> list[int]:
    """Results: input, its weight, the hidden state's weight, two biases, hidden state, cell."""
    of_input, of_hidden = (2 * _rows(args[0]) * weight.numel() for weight in args[1:3])
    return [of_input, of_input, of_hidden, 0, 0, of_hidden]


def _cudnn_rnn(args: Args, result: Any) -> list[int]:
    """All layers and directions of cuDNN's: (input, weights, ...)."""
    return [2 * _rows(args[0]) * _matrices(args[1])]


def _cudnn_rnn_backward(args: Args, result: Any) -> list[int]:
    """Results: input, hidden state, cell, weights."""
    each = 2 * _rows(args[0]) * _matrices(args[1])
    return [each, 0, 0, each * args[-1][3]]


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _matrices(weights: Sequence[Tensor]) -> int:
    return sum(weight.numel() for weight in weights if weight.dim() > 1)


_BY_NAME: dict[Formula, tuple[str, ...]] = {
    _mm: ("mm", "bmm", "_scaled_mm", "_scaled_mm_v2", "_int_mm"),
    _addmm: ("addmm", "baddbmm", "addbmm", "_addmm_activation"),
    _mv: ("mv", "dot", "vdot"),
    _addmv: ("addmv",),
    _grouped_mm: ("_grouped_mm", "_scaled_grouped_mm"),
    _linear: ("linear", "mkldnn_linear"),
    _linear_backward: ("linear_backward",),
    _mkldnn_linear_backward_input: ("mkldnn_linear_backward_input",),
    _mkldnn_linear_backward_weights: ("mkldnn_linear_backward_weights",),
    _convolution: (
        "convolution",
        "_convolution",
        "convolution_overrideable",
        "cudnn_convolution",
        "mkldnn_convolution",
        "_slow_conv2d_forward",
    ),
    _convolution_backward: ("convolution_backward", "convolution_backward_overrideable"),
    _attention: (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    _attention_backward: (
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention_backward",
        "_scaled_dot_product_fused_attention_overrideable_backward",
    ),
    _rnn_layer: ("mkldnn_rnn_layer",),
    _rnn_layer_backward: ("mkldnn_rnn_layer_backward",),
    _cudnn_rnn: ("_cudnn_rnn",),
    _cudnn_rnn_backward: ("_cudnn_rnn_backward",),
}


_HEADS_LAST: dict[str, tuple[Formula, int]] = {
    "_flash_attention_forward": (_heads_last, 3),
    "_efficient_attention_forward": (_heads_last, 4),
    "_flash_attention_backward": (_heads_last_backward, 6),
    "_efficient_attention_backward": (_heads_last_backward, 6),
}
"""And which argument holds the ends of packed sequences."""


@cache
def _formulas() -> dict[Any, Formula]:
    """By operation, of those that this PyTorch has."""
    named = {name: formula for formula, names in _BY_NAME.items() for name in names}
    named |= {name: _packed(formula, name, at) for name, (formula, at) in _HEADS_LAST.items()}
    return {getattr(_aten, name): formula for name, formula in named.items() if hasattr(_aten, name)}
