"""Where a NaN or an infinity first appears: in a weight, a module's output, or a module's backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves


class FirstNonFinite:
    """Watches a model's modules during a forward and backward that is run again to find the culprit.

    An operation of the backward belongs to the innermost module in whose forward it was recorded. Every check reads a
    value from the device, so this is for the diagnosis, not for the run.

    Attributes:
        finding: one clause, such as "the output of blocks.3.feed_forward.down (Linear)"; None while all is finite.
    """

    def __init__(self, model: nn.Module) -> None:
        self.finding: str | None = None
        self._model = model
        self._nodes: set[Node] = set()  # held: a node's Python object is its identity only while it lives

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Check weights now, and outputs and gradients as they are made."""
        for name, parameter in self._model.named_parameters():
            self._check([parameter], f"the weight {name}, before the step")
        handles = []
        for name, module in self._model.named_modules():
            label = f"{name or 'the model'} ({type(module).__name__})"
            handles.append(module.register_forward_hook(partial(self._after_forward, label)))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                hook = partial(self._after_accumulation, f"the sum of the gradients of {name}")
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_forward(self, label: str, module: nn.Module, inputs: Any, output: Any) -> None:
        made = _floating(output)
        self._check(made, f"the output of {label}")
        own = _operations(made, _floating(inputs)) - self._nodes  # inner modules came first
        for node in own:
            node.register_hook(partial(self._after_backward, label, node.name()))
        self._nodes |= own

    def _after_backward(self, label: str, operation: str, given: Any, received: Any) -> None:
        self._check(_floating(received), f"the gradient that reaches {label}")
        self._check(_floating(given), f"the backward of {label}, in {operation}")

    def _after_accumulation(self, what: str, parameter: Tensor) -> None:
        self._check(_floating(parameter.grad), what)

    def _check(self, tensors: Iterable[Tensor], what: str) -> None:
        for tensor in tensors:
            # Detached: a recomputed block must save the same tensors again, whatever was looked at.
            if self.finding is None and not torch.isfinite(tensor.detach()).all():
                self.finding = what


def _operations(made: Iterable[Tensor], given: Iterable[Tensor]) -> set[Node]:
    """The recorded operations that lead from `given` to `made`."""
    before = {tensor.grad_fn for tensor in given}
    found: set[Node] = set()
    waiting = [tensor.grad_fn for tensor in made]
    while waiting:
        node = waiting.pop()
        if node is None or node in before or node in found or hasattr(node, "variable"):
            continue  # what has a variable is no operation: it adds to a parameter's gradient
        found.add(node)
        waiting += [following for following, _ in node.next_functions]
    return found


def _floating(nest: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
