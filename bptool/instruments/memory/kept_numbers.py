"""Python numbers that autograd keeps: `scores * scale` saves the number, as a tensor of its own, for the backward.

A dispatch mode sees the number and not the tensor. What saves it is known (derivatives.yaml of PyTorch): a product or a
quotient of a tensor that requires a gradient keeps the other factor until its node has run. Hooks on saved tensors, and
with them activation checkpoints, do not see it (saved_variable.cpp), so a checkpointed forward keeps it too, and the
graph of a recomputation keeps its own as long as that graph is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Release = Callable[[], None]
"""Gives a number's bytes back."""

_aten = torch.ops.aten
MAY_SAVE_NUMBERS = frozenset({_aten.mul, _aten.mul_, _aten.div, _aten.div_})
"""Operations whose node saves the other factor."""


class KeptNumbers:
    """Tells when such numbers are let go of."""

    def __init__(self) -> None:
        self._of_nodes: dict[int, list[Release]] = defaultdict(list)
        self._of_recomputation: list[Release] = []
        self._running: int | None = None

    def keep(self, release: Release, *, recomputes: bool) -> None:
        """The operation that is being dispatched has one; its node was made just before."""
        if recomputes:
            self._of_recomputation.append(release)
        else:
            self._of_nodes[torch._C._autograd._get_sequence_nr() - 1].append(release)

    def before_operation(self) -> None:
        """Let go of those whose node ran until now."""
        if not self._of_nodes:
            return
        node = torch._C._current_autograd_node()
        number = None if node is None else node._sequence_nr()
        if number != self._running:
            if self._running is not None:
                _call(self._of_nodes.pop(self._running, []))
            self._running = number

    def after_recomputation(self) -> None:
        """Its graph is gone."""
        _call(self._of_recomputation)
        self._of_recomputation = []

    def after_backward(self) -> None:
        """The graph is gone, nodes that were not asked for and all."""
        for releases in self._of_nodes.values():
            _call(releases)
        self._of_nodes.clear()
        self._running = None


def saved_number_bytes(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> int:
    """Size of the number that the node of one of `MAY_SAVE_NUMBERS` saves; 0 where there is none."""
    if func._overloadname == "Scalar" or not torch.is_grad_enabled():
        return 0
    for tensor, other in (args[:2], args[1::-1]):
        if isinstance(tensor, Tensor) and tensor.requires_grad and isinstance(other, int | float | complex):
            return 1 if isinstance(other, bool) else 16 if isinstance(other, complex) else 8
    return 0


def _call(releases: list[Release]) -> None:
    for release in releases:
        release()
