"""Try one operation out, on tensors without values, to see what its kernel takes besides its results."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes  # what fake mode itself is left with
from torch.utils.flop_counter import flop_registry

from bptool.instruments.memory.peak import highest_sum, noted_allocations

_MOST_BYTES = 2**27
_MOST_FLOPS = 2**32  # tens of milliseconds


def try_out(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int | None:
    """Most bytes that this CPU's kernel holds during the operation besides its results; None where it is too large.

    The tensors, real or fake, give their shapes, strides and dtypes; each distinct call is run once in a process.
    """
    if torch._C._autograd._profiler_enabled():  # it listens to one at a time
        return None
    call = _frozen((args, tuple(kwargs.items()), result))
    return _tried(func, call, torch.get_num_threads())


class _Layout(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _frozen(argument: Any) -> Any:
    """An argument as a key: its tensors' layouts, its lists as tuples."""
    if isinstance(argument, Tensor):
        return _Layout(tuple(argument.shape), argument.stride(), argument.dtype)
    return tuple(_frozen(a) for a in argument) if isinstance(argument, list | tuple) else argument


def _thawed(frozen: Any, make: Callable[[_Layout], Any]) -> Any:
    if isinstance(frozen, _Layout):
        return make(frozen)
    return [_thawed(f, make) for f in frozen] if isinstance(frozen, tuple) else frozen


@functools.cache
def _tried(func: torch._ops.OpOverload, call: Any, n_threads: int) -> int | None:
    sizes: list[int] = []
    args, _, result = _thawed(call, lambda layout: _measure(layout, sizes))
    if sum(sizes) > _MOST_BYTES or _flops(func, args, result) > _MOST_FLOPS:
        return None
    with _disable_current_modes(), torch.no_grad():
        args, kwargs, _ = (_thawed(part, _made) for part in call)
        random_state = torch.default_generator.get_state()
        with noted_allocations() as changes:
            result = func(*args, **dict(kwargs))
        del result
        torch.default_generator.set_state(random_state)
    return highest_sum(changes) - sum(changes)


def _made(layout: _Layout) -> Tensor:
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype)


def _measure(layout: _Layout, sizes: list[int]) -> tuple[int, ...]:
    sizes.append(math.prod(layout.shape) * layout.dtype.itemsize)
    return layout.shape


def _flops(func: torch._ops.OpOverload, shapes: list[Any], result: Any) -> int:
    """Of products and convolutions; attention's by hand, which torch does not count on a CPU."""
    if "attention" in func.overloadpacket.__name__:
        return int(10 * math.prod(shapes[0]) * shapes[2][2])
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*shapes, out_val=result)) if formula and "backward" not in func.overloadpacket.__name__ else 0
