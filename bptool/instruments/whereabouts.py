"""Which module is at work: in a forward the innermost one called, in a backward the one that recorded the node."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Whereabouts:
    """Follows a model's modules through forward and backward.

    Autograd numbers its nodes as a forward records them, so the numbers that were given while a module ran tell in the
    backward whose node this is.
    """

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._first_numbers: list[int] = [0]
        self._modules: list[str] = [""]
        self._owners: dict[int, str] = {}

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Be told by the model's modules."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                for parameter in module.parameters(recurse=False):
                    self._owners[id(parameter)] = name
                hooks.callback(module.register_forward_pre_hook(self._entering(name)).remove)
                hooks.callback(module.register_forward_hook(self._leaving, always_call=True).remove)
            yield

    def forget(self) -> None:
        """The nodes of earlier steps are gone."""
        self._first_numbers, self._modules = [0], [""]

    def owner(self, parameter: Tensor) -> str:
        """The module that a parameter belongs to; empty where it is the model itself, or none that is followed."""
        return self._owners.get(id(parameter), "")

    def module(self) -> str | None:
        """Dotted name, empty for the model itself; None where no module is at work."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        variable = getattr(node, "variable", None)  # the node that accumulates a leaf's gradient
        if variable is not None:
            return self.owner(variable)
        return self._modules[bisect_right(self._first_numbers, node._sequence_nr()) - 1]

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._stack.append(name)
            self._turn()

        return hook

    def _leaving(self, *_: Any) -> None:
        self._stack.pop()
        self._turn()

    def _turn(self) -> None:
        """From here on nodes are another module's."""
        self._first_numbers.append(torch._C._autograd._get_sequence_nr())
        self._modules.append(self._stack[-1] if self._stack else "")
