"""PyTorch's dispatcher, as far as we need it: operations by name, and which device has a kernel of its own.

PyTorch has no public way to ask either, so its private ones are called here and nowhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch.library import Library


def operator(name: str) -> torch._ops.OpOverload:
    """The aten operation `name`, such as `mm` or `softmax.int`."""
    packet, _, overload = name.partition(".")
    found: torch._ops.OpOverload = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return found


def has_kernel(name: str, key: str) -> bool:
    """Whether the aten operation exists and has a kernel registered for that dispatch key itself."""
    full = f"aten::{name}"
    return full in _names() and bool(torch._C._dispatch_has_kernel_for_dispatch_key(full, key))


@cache
def is_composite(func: torch._ops.OpOverload) -> bool:
    """Whether it is made of other operations, on every device."""

    def has(key: str) -> bool:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))

    return func.namespace == "aten" and has("CompositeImplicitAutograd") and not has("CPU")


def aten_names() -> list[str]:
    """Every aten operation's name, with its overload."""
    return sorted(name.removeprefix("aten::") for name in _names())


@contextmanager
def standing_in(kernels: Iterable[tuple[str, str, Callable[..., Any]]]) -> Iterator[None]:
    """While entered, each (operation, dispatch key, function) is what the dispatcher calls."""
    library = Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*previously registered kernel")  # which is what we want
            for name, key, function in kernels:
                library.impl(name, function, key)
        yield
    finally:
        library._destroy()  # the public way is to wait for the garbage collector


def below_autograd() -> AbstractContextManager[object]:
    """Operations called in it skip autograd, and whatever stands in for a kernel there."""
    guard: AbstractContextManager[object] = torch._C._AutoDispatchBelowAutograd()
    return guard


@cache
def _names() -> frozenset[str]:
    return frozenset(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
