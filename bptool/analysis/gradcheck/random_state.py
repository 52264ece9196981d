"""PyTorch's global generators: seeded for one evaluation after the other, and put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """The CPU's generator and every GPU's that is in use are afterwards as they were.

    Args:
        device: a GPU that may not be in use yet, and will be.
    """
    used = torch.cuda.is_initialized() or (device is not None and device.type == "cuda")
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count())) if used else []):
        yield


def seed_generators(seed: int) -> None:
    """What `torch.manual_seed` does, without its cost where there is no device but the CPU.

    For each kind of device that is not in use it keeps the seed for later, together with the call's formatted stack:
    more work than a forward of a small function. Where a device could still be used, that has to be done.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
