"""Loops whose rounds do the same with tensors of the same shapes: who counts without values need not run them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

_T = TypeVar("_T")
Abridge = Callable[[Sequence[Any]], Iterable[Any]]
"""From a loop's rounds those that are to be run."""

_abridge: ContextVar[Abridge] = ContextVar("_abridge", default=iter)


def alike(rounds: Sequence[_T]) -> Iterable[_T]:
    """The rounds of a loop that does in each what it does in the others, but for the last, which may be shorter.

    All of them; fewer only where `abridging` was asked for.
    """
    return _abridge.get()(rounds)


@contextmanager
def abridging(how: Abridge) -> Iterator[None]:
    """While entered, `how` says which rounds are run. No result has its value then."""
    token = _abridge.set(how)
    try:
        yield
    finally:
        _abridge.reset(token)
