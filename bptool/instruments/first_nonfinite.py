"""Where a NaN or an infinity first appears: the innermost module whose output, or whose gradient, is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


class FirstNonFinite:
    """Watches a model's modules during a forward and backward that is run again to find the culprit.

    Every check reads a value from the device, so this is for the diagnosis, not for the run.

    Attributes:
        finding: one clause, such as "the output of blocks.3.feed_forward.down (Linear)"; None while all is finite.
    """

    def __init__(self, model: nn.Module) -> None:
        self.finding: str | None = None
        self._model = model

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Check weights now, and outputs and gradients as they are made."""
        for name, parameter in self._model.named_parameters():
            self._check(parameter, f"the weight {name}, before the step")
        handles = []
        for name, module in self._model.named_modules():
            label = f"{name or 'the model'} ({type(module).__name__})"
            handles.append(module.register_forward_hook(partial(self._after_forward, label)))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                hook = partial(self._after_gradient, f"the gradient of {name}")
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_forward(self, label: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self._check(leaf, f"the output of {label}")
                if leaf.requires_grad:
                    leaf.register_hook(partial(self._check, what=f"the gradient of the output of {label}"))

    def _after_gradient(self, what: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._check(parameter.grad, what)

    def _check(self, tensor: torch.Tensor, what: str) -> None:
        if self.finding is None and not torch.isfinite(tensor).all():
            self.finding = what
