"""A second look at a target whose forward computes in a lower precision: the same with its casts raised to float64.

Differences cannot see a small error through the rounding of float32. Where a model casts its values itself, as norms
and losses of language models do, its formulas are the same in float64, where they can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bptool.analysis.gradcheck.connection import function_at_work
from bptool.analysis.gradcheck.result import TensorCheck
from bptool.training.assembly import default_dtype

_RAISED = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
_LOWERING = (Tensor.float, Tensor.half, Tensor.bfloat16)


@contextmanager
def raised_casts() -> Iterator[None]:
    """While entered, what is cast to, or made in, a lower precision is so in float64."""
    with default_dtype(torch.float64), _RaisedCasts():
        yield


class _RaisedCasts(TorchFunctionMode):
    """Changes the dtypes that functions are given.

    Inside an `autograd.Function` nothing is changed: its backward, which computes as it is, stands for it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function_at_work() is not None:
            return func(*args, **kwargs)
        if func in _LOWERING and args[0].is_floating_point():
            return args[0].double()
        raised = {key: _of(value) for key, value in kwargs.items()}
        return func(*map(_of, args), **raised)


def second_look(tensors: Iterable[TensorCheck], raised: Mapping[str, TensorCheck]) -> list[TensorCheck]:
    """The verdicts, with what the look at raised casts says of those that precision limits.

    Args:
        raised: the verdicts with raised casts, by name.
    """
    return [_looked_at(one, raised[one.name]) if one.verdict == "precision_limited" else one for one in tensors]


def _looked_at(tensor: TensorCheck, raised: TensorCheck) -> TensorCheck:
    if raised.verdict == "wrong":
        detail = "; ".join(filter(None, ["with its casts raised to float64", raised.detail]))
        return raised.model_copy(update={"detail": detail})
    if raised.verdict != "right" or raised.detectable_relative_error is None:
        return tensor
    seen = (
        f"right with its casts raised to float64, where any error from {raised.detectable_relative_error:.1e} on shows"
    )
    return tensor.model_copy(update={"detail": seen})


def _of(value: Any) -> Any:
    return _RAISED.get(value, value) if isinstance(value, torch.dtype) else value
