"""Which module is at work: in a forward the innermost one called, in a backward the one that recorded the node.

A module that is held under several names goes by the one under which its caller holds it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
        self.calls: Counter[str] = Counter()
        """How often each module was called outside of backwards, by the name of the call."""

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Be told by the model's modules."""
        names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(module, []).append(name)
        with ExitStack() as hooks:
            for module, held_as in names.items():
                for parameter in module.parameters(recurse=False):
                    self._owners[id(parameter)] = held_as[0]
                hooks.callback(module.register_forward_pre_hook(self._entering(held_as)).remove)
                hooks.callback(module.register_forward_hook(self._leaving, always_call=True).remove)
            yield

    def forget(self) -> None:
        """The nodes and calls of earlier steps are gone."""
        self._first_numbers, self._modules = [0], [""]
        self.calls = Counter()

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
        return self.recorded_by(node._sequence_nr())

    def recorded_by(self, number: int) -> str:
        """The module that was at work when autograd recorded the node of this number."""
        return self._modules[bisect_right(self._first_numbers, number) - 1]

    @property
    def outermost(self) -> str | None:
        """The outermost module whose forward is running; a recomputation begins anew. None: no forward is running."""
        return self._stack[0] if self._stack else None

    def _entering(self, held_as: Sequence[str]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            name = held_as[0] if len(held_as) == 1 else self._held_by_caller(held_as)
            self._stack.append(name)
            self._turn()
            if torch._C._current_autograd_node() is None:
                self.calls[name] += 1

        return hook

    def _held_by_caller(self, names: Sequence[str]) -> str:
        """The shortest name that begins with the nearest caller's; the first where no caller holds the module.

        A recomputation's caller is the module whose gradient is in the making, or one around it.
        """
        for caller in reversed(self._stack or _with_parents(self.module() or "")):
            prefix = f"{caller}." if caller else ""
            held = [name for name in names if name.startswith(prefix)]
            if held:
                return min(held, key=lambda name: name.count("."))
        return names[0]

    def _leaving(self, *_: Any) -> None:
        self._stack.pop()
        self._turn()

    def _turn(self) -> None:
        """From here on nodes are another module's."""
        self._first_numbers.append(torch._C._autograd._get_sequence_nr())
        self._modules.append(self._stack[-1] if self._stack else "")


def _with_parents(name: str) -> list[str]:
    """`a.b` to `["", "a", "a.b"]`."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]
