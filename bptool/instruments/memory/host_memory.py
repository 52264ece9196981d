"""What a run on a device keeps in host memory, and a simulation of it must not count."""

from __future__ import annotations

import torch

from bptool.training.offload import TO_HOST

_aten = torch.ops.aten
_SEED_AND_OFFSET = {  # positions among the results; flash's are on the device (PyTorch's attention.cu, cuDNN's MHA.cpp)
    _aten._scaled_dot_product_efficient_attention.default: (2, 3),
    _aten._scaled_dot_product_cudnn_attention.default: (6, 7),
}


def stays_on_host(func: torch._ops.OpOverload, position: int, phase: str) -> bool:
    """Whether an operation's result at `position` is in host memory where the run's tensors are on a device.

    Those are the counters that an optimizer makes from a number, unless it is fused, the seed and offset of two
    attention kernels' random numbers, and what is offloaded.
    """
    if func is TO_HOST:
        return True
    if func is _aten.lift_fresh.default:  # what `torch.tensor` calls
        return phase == "optimizer"
    return position in _SEED_AND_OFFSET.get(func, ())
