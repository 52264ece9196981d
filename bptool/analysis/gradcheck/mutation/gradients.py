"""Bugs that any operation's backward can have: what they make of the gradient that it sends on to one of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GradientBug:
    """A wrong gradient made of the right one.

    Attributes:
        change: the right gradient to the wrong one, of the same shape; it leaves its argument alone.
        fits: whether a gradient of this shape can be wrong so.
        of_previous_call: what is changed is the gradient of a call before this one, at another point.
    """

    name: str
    change: Callable[[Tensor], Tensor]
    fits: Callable[[Shape], bool]
    of_previous_call: bool = False


def _any(shape: Shape) -> bool:
    return True


def _several(shape: Shape) -> bool:
    return bool(shape) and max(shape) > 1


def _columns(shape: Shape) -> bool:
    return bool(shape) and shape[-1] > 1


def _rows(shape: Shape) -> bool:
    return len(shape) > 1 and shape[-2] > 1


def _matrix(shape: Shape) -> bool:
    return _rows(shape) and _columns(shape)


def _batch(shape: Shape) -> bool:
    return len(shape) > 1 and shape[0] > 1


def _heads(shape: Shape) -> bool:
    return len(shape) > 3 and shape[1] > 1


def _transposed(gradient: Tensor) -> Tensor:
    """Where it is not square, its numbers are read in the other order."""
    return gradient.mT.reshape(gradient.shape)


def _one_element(gradient: Tensor, factor: float) -> Tensor:
    """The middle one of those that are not zero."""
    wrong = gradient.clone(memory_format=torch.contiguous_format)
    places = wrong.flatten().nonzero().flatten()
    if len(places):
        wrong.view(-1)[places[len(places) // 2]] *= factor
    return wrong


def _scaled_at(gradient: Tensor, dim: int, index: int | slice, factor: float) -> Tensor:
    wrong = gradient.clone()
    place = [slice(None)] * gradient.dim()
    place[dim] = slice(index, index + 1 or None) if isinstance(index, int) else index
    wrong[tuple(place)] *= factor
    return wrong


def _rounded(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def rounded(gradient: Tensor) -> Tensor:
        if gradient.is_complex():
            return torch.view_as_complex(torch.view_as_real(gradient.resolve_conj()).to(dtype).double())
        return gradient.to(dtype).to(gradient.dtype)

    return rounded


def _rms(gradient: Tensor) -> Tensor:
    return gradient.abs().square().mean().sqrt()


def _clipped(gradient: Tensor) -> Tensor:
    size, most = gradient.abs(), _rms(gradient)
    return torch.where(size > most, gradient * (most / size.clamp(min=1e-300)), gradient)


def _flushed(gradient: Tensor) -> Tensor:
    size = gradient.abs()
    return torch.where(size < 1e-2 * size.max(), 0, gradient) if gradient.numel() else gradient


def _with_nan(gradient: Tensor) -> Tensor:
    wrong = gradient.clone(memory_format=torch.contiguous_format)
    wrong.view(-1)[-1:] = float("nan")
    return wrong


def _swapped_rows(gradient: Tensor) -> Tensor:
    order = torch.arange(gradient.shape[-2], device=gradient.device)
    order[:2] = order[:2].flip(0)
    return gradient.index_select(-2, order)


GRADIENT_BUGS: tuple[GradientBug, ...] = (
    GradientBug("0.05% too large", lambda g: g * 1.0005, _any),
    GradientBug("1% too small", lambda g: g * 0.99, _any),
    GradientBug("counted twice", lambda g: g * 2, _any),
    GradientBug("wrong sign", lambda g: -g, _any),
    GradientBug("zero, as if detached", torch.zeros_like, _any),
    GradientBug("of the previous call, from a stale buffer", lambda g: g, _any, of_previous_call=True),
    GradientBug("mean over the rows in place of the sum", lambda g: g / g.shape[-2], _rows),
    GradientBug("multiplied with sqrt(width) once too often", lambda g: g * g.shape[-1] ** 0.5, _columns),
    GradientBug("transposed", _transposed, _matrix),
    GradientBug("columns off by one", lambda g: g.roll(1, -1), _columns),
    GradientBug("rows off by one", lambda g: g.roll(1, -2), _rows),
    GradientBug("columns in reverse order", lambda g: g.flip(-1), _columns),
    GradientBug("two rows exchanged", _swapped_rows, _rows),
    GradientBug("one element zero", lambda g: _one_element(g, 0.0), _several),
    GradientBug("one element 1% off", lambda g: _one_element(g, 1.01), _any),
    GradientBug("one element with the wrong sign", lambda g: _one_element(g, -1.0), _several),
    GradientBug("one row 1% off", lambda g: _scaled_at(g, -2, 0, 1.01), _rows),
    GradientBug("last row missing", lambda g: _scaled_at(g, -2, -1, 0.0), _rows),
    GradientBug("last row added twice", lambda g: _scaled_at(g, -2, -1, 2.0), _rows),
    GradientBug("last column missing", lambda g: _scaled_at(g, -1, -1, 0.0), _columns),
    GradientBug(
        "second half of the columns missing", lambda g: _scaled_at(g, -1, slice(g.shape[-1] // 2, None), 0.0), _columns
    ),
    GradientBug("every second column missing", lambda g: _scaled_at(g, -1, slice(1, None, 2), 0.0), _columns),
    GradientBug("one head missing", lambda g: _scaled_at(g, 1, 0, 0.0), _heads),
    GradientBug("one sequence missing", lambda g: _scaled_at(g, 0, 0, 0.0), _batch),
    GradientBug("the first sequence's for all", lambda g: g[:1].expand(g.shape).clone(), _batch),
    GradientBug("rounded to bfloat16", _rounded(torch.bfloat16), _any),
    GradientBug("rounded to float16", _rounded(torch.float16), _any),
    GradientBug("rounded to float32", _rounded(torch.float32), _any),
    GradientBug("small values flushed to zero", _flushed, _several),
    GradientBug("clipped at its root mean square", _clipped, _several),
    GradientBug("only its positive part", lambda g: torch.where(g.real > 0, g, 0), _several),
    GradientBug("a constant added", lambda g: g + 1e-3 * _rms(g), _any),
    GradientBug("mean of the columns taken off", lambda g: g - g.mean(-1, keepdim=True), _columns),
    GradientBug("one element NaN", _with_nan, _any),
)
