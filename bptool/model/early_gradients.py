"""Gradients that are computed before the backward, as a fused loss does in its forward: how to say so.

Nothing in PyTorch tells such a product from a forward's. Model code says it, and instruments that tell gradients from
forwards listen; without one, saying it costs a look at an empty list. A user's own `autograd.Function` may say it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

GradientOf = Literal["input", "parameters"]
Listener = Callable[[GradientOf | None], None]
"""Told whose gradient is computed from now on; None: no more."""

_listeners: list[Listener] = []
_UNHEARD = nullcontext()


def computing_gradient(of: GradientOf) -> AbstractContextManager[None]:
    """What runs in it computes a gradient, wherever it is run."""
    return _announced(of) if _listeners else _UNHEARD


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While entered, the listener is told."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def _announced(of: GradientOf) -> Iterator[None]:
    for listener in _listeners:
        listener(of)
    try:
        yield
    finally:
        for listener in _listeners:
            listener(None)
