"""Which of a backward's gradients is of a layer's input and which of its parameters, read off autograd's graph.

A node of the graph makes one gradient for each of its edges. It is the parameters' (`wgrad`) where the edge leads to a
parameter, perhaps through a transpose, a cast, a slice or arithmetic among parameters alone; any other is an input's
(`dgrad`). Nothing is known of modules, so it holds for tied, frozen, cast and adapted weights and for any model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

Gradient = Literal["dgrad", "wgrad"]
Edges = tuple[Gradient | None, ...]
"""For each of a node's edges; None: no gradient is wanted there."""
Done = Callable[[int, Edges, Sequence[Tensor | None]], None]
"""Told of a node that ran: its number, its edges, and the gradients that it made for them."""

_RESHAPING = {"Alias", "AsStrided", "Cat", "Clone", "Expand", "Permute", "Repeat", "ReshapeAlias", "Select", "Slice"}
_RESHAPING |= {"Split", "SplitWithSizes", "Squeeze", "Stack", "T", "ToCopy", "Transpose", "Unbind", "UnsafeSplit"}
_RESHAPING |= {"UnsafeView", "Unsqueeze", "View"}
_ARITHMETIC = {"Abs", "Add", "Div", "Exp", "Mul", "Neg", "Pow", "Rsub", "Sigmoid", "Softplus", "Sub", "Tanh"}
_ARITHMETIC |= {"WeightNormInterface"}
_PRODUCTS = {"Bmm", "Mm"}


class GradientGraph:
    """The nodes that a backward will run, by autograd's number for them.

    Args:
        done: called after each node whose edges are of both kinds; the others need no second look.
    """

    def __init__(self, done: Done) -> None:
        self._done = done
        self._edges: dict[int, Edges] = {}
        self._of_parameters: dict[int, bool] = {}
        self.leaves: dict[int, Tensor] = {}
        """Tensors whose gradient is accumulated, by identity."""

    @property
    def numbers(self) -> Iterable[int]:
        """Of all nodes that were found."""
        return self._edges

    def add(self, roots: Iterable[Any]) -> None:
        """Find what can be reached from these nodes, before they run."""
        waiting = [root for root in roots if root is not None]
        while waiting:
            node = waiting.pop()
            if is_leaf(node):
                self.leaves[id(node.variable)] = node.variable
                continue
            number = node._sequence_nr()
            if number not in self._edges:
                edges: Edges = tuple(None if to is None else self._kind(to) for to, _ in node.next_functions)
                self._edges[number] = edges
                if "dgrad" in edges and "wgrad" in edges:
                    node.register_hook(partial(self._after, number, edges))
                waiting.extend(to for to, _ in node.next_functions if to is not None)

    def edges(self, node: Any) -> Edges:
        """Of a node that is running; one that was not known is added (too late to be told when it is done)."""
        number = node._sequence_nr()
        if number not in self._edges:
            self.add([node])
        return self._edges[number]

    def _after(self, number: int, edges: Edges, gradients: Sequence[Tensor | None], _: object) -> None:
        self._done(number, edges, gradients)

    def _kind(self, node: Any) -> Gradient:
        return "wgrad" if self._leads_to_parameters(node) else "dgrad"

    def _leads_to_parameters(self, node: Any) -> bool:
        if is_leaf(node):
            return is_parameter(node.variable)
        number = node._sequence_nr()
        if number not in self._of_parameters:
            self._of_parameters[number] = self._is_of_parameters(node)
        return self._of_parameters[number]

    def _is_of_parameters(self, node: Any) -> bool:
        """Whether this node's result was made of parameters alone, as far as a graph without constants tells."""
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        known = name in _RESHAPING or name in _ARITHMETIC or name in _PRODUCTS
        sources = [to for to, _ in node.next_functions if to is not None] if known else []
        if not sources or not all(map(self._leads_to_parameters, sources)):
            return False
        if name in _PRODUCTS:
            return len(sources) == len(node.next_functions)  # else the other factor may be data
        # What a parameter is scaled or shifted by is one of the model's constants, unless it has a batch's dimensions.
        return name in _RESHAPING or _numel(node) <= max(map(_numel, sources))


def is_leaf(node: Any) -> bool:
    """Whether a node accumulates a leaf's gradient, its `variable`'s."""
    return type(node).__name__ == "AccumulateGrad"


def is_parameter(tensor: Tensor) -> bool:
    """Whether it is some module's, rather than an input that wants a gradient."""
    return isinstance(tensor, nn.Parameter)


def _numel(node: Any) -> int:
    """Elements of what the node made in the forward, or of a leaf."""
    if is_leaf(node):
        return int(node.variable.numel())
    return int(torch.Size(node._input_metadata[0].shape).numel())  # no public way to ask
