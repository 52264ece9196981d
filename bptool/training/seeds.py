"""Seeds as functions of what they are for, so that nothing random has to be stored or replayed."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from its parts, e.g. `derive_seed(seed, "step", n)`: equal parts, equal seed, on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_step(seed: int, step: int) -> None:
    """Make all that PyTorch's global generators draw in a step (dropout) a function of the run's seed and the step."""
    torch.manual_seed(derive_seed(seed, "step", step))
