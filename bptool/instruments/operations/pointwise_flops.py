"""FLOPs of everything that multiplies no matrices: the arithmetic steps of an operation, for each of its elements.

One step is an addition, a multiplication, a division, a root, or an elementary function (exp, log, tanh, erf, a
sigmoid). An operation made of several has as many as its formula in PyTorch's documentation, written out: `addcmul`
multiplies twice and adds, `silu` is a sigmoid and a multiplication. Comparisons, choices, conversions, copies, fills
and indices are no arithmetic. A fused update has the steps of the same update in `torch.optim`'s loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_PER_RESULT: dict[int, str] = {
    1: "rsub mul div neg sqrt rsqrt reciprocal exp expm1 exp2 log log1p log2 log10 sin cos tan tanh erf erfc sigmoid"
    " pow square atan2 fmod remainder asin acos atan sinh cosh cumsum cumprod leaky_relu",
    2: "silu softplus elu mse_loss native_dropout native_dropout_backward leaky_relu_backward",
    3: "addcmul addcdiv lerp tanh_backward sigmoid_backward mse_loss_backward",
    4: "log_sigmoid_forward softplus_backward",
    6: "silu_backward",
}
"""Steps for each element of the (first) result; a trailing underscore and `_foreach_` are left off."""

_PER_INPUT: dict[int, str] = {
    1: "sum mean prod nansum logcumsumexp avg_pool2d _adaptive_avg_pool2d embedding_dense_backward",
    2: "linalg_vector_norm norm",
    3: "logsumexp",
    4: "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data var std var_mean std_mean",
}
"""Steps for each element of the first argument."""

_PER_SOURCE = ("scatter_add", "index_add", "index_put", "_index_put_impl", "scatter_reduce")
"""One for each element that is added to the target."""

GELU_STEPS = {"none": (5, 11), "tanh": (9, 18)}
"""Steps forward and backward: `x (1 + erf(x / sqrt 2)) / 2`, or with the tanh of a cubic in x."""

_NORMS: dict[str, tuple[int, int, int]] = {
    # Mean (1), variance (3), centre and scale (2); with a weight 1 more, with a bias another.
    "native_layer_norm": (6, 1, 1),
    "native_group_norm": (6, 1, 1),
    "native_batch_norm": (6, 1, 1),
    "_native_batch_norm_legit": (6, 1, 1),
    "cudnn_batch_norm": (6, 1, 1),
    "_fused_rms_norm": (3, 1, 0),
}


def pointwise_flops(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Arithmetic of an operation that is no matrix product; 0 where it does none, or is not known."""
    count = _counter(func)
    return 0 if count is None else count(args, kwargs, result)


_Counter = Callable[[Sequence[Any], Mapping[str, Any], Any], int]


@cache
def _counter(func: torch._ops.OpOverload) -> _Counter | None:
    name = str(func.overloadpacket).rpartition(".")[2]
    fused = _FUSED.get(name)
    if fused is not None:
        return fused
    plain = name.removeprefix("_foreach_").rstrip("_")
    if plain in ("add", "sub"):
        return _sum
    if plain in ("gelu", "gelu_backward"):
        return _gelu(plain == "gelu_backward")
    if plain in _PER_SOURCE:
        return _added_sources
    if plain in _NORMS:
        return _norm(*_NORMS[plain])
    if plain in _NORM_BACKWARDS:
        return _norm_backward
    per_result = {op: steps for steps, ops in _PER_RESULT.items() for op in ops.split()}
    per_input = {op: steps for steps, ops in _PER_INPUT.items() for op in ops.split()}
    if plain in per_result:
        return _times_results(per_result[plain])
    return _times_inputs(per_input[plain]) if plain in per_input else None


def _times_results(steps: int) -> _Counter:
    def count(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
        return steps * (_results(args, result))

    return count


def _times_inputs(steps: int) -> _Counter:
    def count(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
        return steps * _numel(args[0])

    return count


def _sum(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """`x + alpha y` multiplies too, unless alpha is 1; integers (indices, counters of steps) are counted alike."""
    alpha = kwargs.get("alpha", 1)
    return (1 if alpha == 1 else 2) * _results(args, result)


def _gelu(backward: bool) -> _Counter:
    def count(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
        return GELU_STEPS[kwargs.get("approximate", "none")][backward] * _results(args, result)

    return count


def _added_sources(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Of (target, dim, index, source) and (target, indices, values, accumulate)."""
    if isinstance(args[2], Tensor) and isinstance(args[1], list | tuple):
        return _numel(args[2]) if len(args) > 3 and args[3] else 0
    return _numel(args[3]) if len(args) > 3 else 0


def _norm(steps: int, weight: int, bias: int) -> _Counter:
    def count(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
        affine = [isinstance(arg, Tensor) for arg in args[1:4]]
        with_weight = any(affine)
        with_bias = sum(affine) > 1
        return (steps + weight * with_weight + bias * with_bias) * _numel(args[0])

    return count


_NORM_BACKWARDS = (
    "native_layer_norm_backward",
    "native_group_norm_backward",
    "native_batch_norm_backward",
    "cudnn_batch_norm_backward",
    "_fused_rms_norm_backward",
)


def _norm_backward(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """From slope g and normalised x: `(g w - mean(g w) - x mean(g w x)) / std`, `sum g x`, `sum g`.

    Of the input's gradient nine steps: x is made again (2), g w, two means (3), the bracket (3), the division counted
    with x's scale. Two for the weight's, one for the bias's.
    """
    steps = (9, 2, 1)
    return sum(step * _numel(args[0]) for step, made in zip(steps, result, strict=False) if isinstance(made, Tensor))


def _adam(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Decay 2 (into the gradient), lerp 3, mul 1, addcmul 3, root 1, div 1, add 1, addcdiv 3: `_single_tensor_adam`."""
    return _adam_steps(kwargs, decay=2) * _numel(args[0])


def _adamw(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """The same, but that the decay is one multiplication of the weight."""
    return _adam_steps(kwargs, decay=1) * _numel(args[0])


def _adam_steps(kwargs: Mapping[str, Any], decay: int) -> int:
    return 13 + (decay if kwargs["weight_decay"] else 0) + bool(kwargs["maximize"])


def _sgd(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Decay 2, momentum 1 and 1 (2 with dampening), Nesterov 2, update 2: `_single_tensor_sgd`."""
    momentum = 0
    if kwargs["momentum"]:
        later = 2 + (kwargs["dampening"] != 0)
        momentum = (0 if kwargs["is_first_step"] else later) + 2 * bool(kwargs["nesterov"])
    return (2 + 2 * bool(kwargs["weight_decay"]) + bool(kwargs["maximize"]) + momentum) * _numel(args[0])


def _adagrad(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Decay 2, addcmul 3, root 1, add 1, addcdiv 3: `_single_tensor_adagrad`."""
    return (8 + 2 * bool(kwargs["weight_decay"]) + bool(kwargs["maximize"])) * _numel(args[0])


_FUSED: dict[str, _Counter] = {
    "_fused_adam_": _adam,
    "_fused_adamw_": _adamw,
    "_fused_sgd_": _sgd,
    "_fused_adagrad_": _adagrad,
}


def _results(args: Sequence[Any], result: Any) -> int:
    """Elements of the first result; an operation in place on a list of tensors returns nothing."""
    if isinstance(result, Tensor):
        return result.numel()
    if isinstance(result, tuple) and result:
        return _numel(result[0])
    return _numel(result) if result else _numel(args[0])


def _numel(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    return sum(_numel(one) for one in value) if isinstance(value, list | tuple) else 0
