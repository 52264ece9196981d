"""Pieces of work that are alike: what only counts work need not do them all.

Model code says which; an instrument that counts shapes on fake tensors listens, and is told how many pieces the one
that it sees stands for. Where nobody listens all are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

Listener = Callable[[int], None]
"""Told how many pieces the work from here on stands for."""

_listeners: list[Listener] = []


def alike(pieces: Sequence[T]) -> Iterable[T]:
    """The pieces; all but the last take the same work."""
    return _first_and_last(pieces) if _listeners and len(pieces) > 2 else pieces


@contextmanager
def counting_once(listener: Listener) -> Iterator[None]:
    """While entered, of pieces that are alike one is done."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _first_and_last(pieces: Sequence[T]) -> Iterator[T]:
    _tell(len(pieces) - 1)
    try:
        yield pieces[0]
    finally:
        _tell(1)
    yield pieces[-1]


def _tell(times: int) -> None:
    for listener in _listeners:
        listener(times)
