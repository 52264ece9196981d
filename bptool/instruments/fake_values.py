"""What fake tensors are asked for and have not: values, and quickly, their device."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor  # no public name tells a fake tensor from a real one

_DEVICE, _READ = torch.ops.prim.device.default, torch.ops.aten._local_scalar_dense.default


def device_of_fake(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> torch.device | None:
    """The answer, where a fake tensor's device is asked for: more often than all operations together."""
    return args[0].fake_device if func is _DEVICE and isinstance(args[0], FakeTensor) else None


def value_of_fake(func: torch._ops.OpOverload, args: tuple[Any, ...], phase: str) -> Any:
    """A number in place of a fake tensor's value, where no shape depends on it; None where nothing is to be read.

    An update rule may scale by a value (Adafactor); while a model is made, outside of all phases, `trunc_normal_` draws
    until nothing is out of bounds, which nothing is then. Elsewhere the read is PyTorch's to refuse.
    """
    if func is not _READ or not isinstance(args[0], FakeTensor):
        return None
    if phase == "optimizer":
        return 1.0
    if not phase and args[0].constant is None:  # made of numbers, such as `torch.tensor(3)`: these are known
        return 0.0 if args[0].is_floating_point() else 0
    return None
