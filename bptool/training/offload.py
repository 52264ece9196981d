"""Saved tensors in host memory: a block's activations leave the device in the forward and come back in the backward.

PyTorch's `save_on_cpu` does so too, but takes weights along, and a tensor once for each operation that saves it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bptool.hardware import acts_as_cuda

_SMALL_BYTES = 4096
"""A smaller tensor stays where it is: a transfer of it would take longer than most operations."""


@torch.library.custom_op("bptool::to_host", mutates_args=())
def _to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, where there is such; its strides are those of `x`, if they leave no gaps."""
    copy = torch.empty_like(x, device="cpu", pin_memory=torch.cuda.is_available())
    return copy.copy_(x, non_blocking=True)  # read again on the same stream, which waits for it


@_to_host.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu")


TO_HOST: torch._ops.OpOverload = torch.ops.bptool.to_host.default
"""The operation, as PyTorch's dispatcher names it: what it returns is in host memory, also in a simulation."""


def offloading(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The module's `forward`, with what it saves in host memory; on a CPU all stays where it is."""
    return partial(_run, module, forward)


def _run(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    weights = {id(tensor.untyped_storage()) for tensor in (*module.parameters(), *module.buffers())}
    packing = _Packing(weights)
    with saved_tensors_hooks(packing.pack, _unpack):
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class _Away:
    """What autograd keeps of a tensor that is in host memory."""

    copy: Tensor
    device: torch.device


class _Packing:
    """Takes a forward's tensors away, each once.

    Args:
        weights: storages that are on the device anyway.
    """

    def __init__(self, weights: set[int]) -> None:
        self._weights = weights
        self._taken: dict[tuple[Any, ...], tuple[weakref.ref[Any], _Away]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Away:
        """The tensor itself, where it is small, a weight, or in host memory already."""
        storage = tensor.untyped_storage()
        if not acts_as_cuda(tensor) or tensor.nbytes < _SMALL_BYTES or id(storage) in self._weights:
            return tensor
        view = (id(storage), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        found = self._taken.get(view)
        if found is not None and found[0]() is storage:  # and not a later one in the same place
            return found[1]
        away = _Away(TO_HOST(tensor), tensor.device)
        self._taken[view] = weakref.ref(storage), away
        return away


def _unpack(packed: Tensor | _Away) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return torch.empty_like(packed.copy, device=packed.device).copy_(packed.copy, non_blocking=True)
