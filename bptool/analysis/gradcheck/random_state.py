"""PyTorch's global generators, put back as they were."""

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
