"""Activation checkpointing: which blocks the backward computes again instead of keeping what they saved."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from bptool.config.schema import ActivationCheckpointSettings
from bptool.training.instrument import Announcer


def recomputed_blocks(n_blocks: int, settings: ActivationCheckpointSettings) -> list[int]:
    """Indices of the blocks that the backward computes again."""
    match settings.policy:
        case "none":
            return []
        case "full":
            return list(range(n_blocks))
        case "every_k":
            return list(range(0, n_blocks, settings.every))


def apply(blocks: Sequence[nn.Module], settings: ActivationCheckpointSettings, announcer: Announcer) -> None:
    """Make the chosen blocks recompute, and announce each recomputation as a phase.

    Each block's `forward` is replaced on the instance, so that parameter names stay those of the plain model. Dropout
    is replayed: the random state of the forward is restored for the recomputation.
    """

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), announcer.phase("recompute")

    for index in recomputed_blocks(len(blocks), settings):
        block = blocks[index]
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
