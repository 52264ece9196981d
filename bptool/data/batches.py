"""Batches as the training step takes them: int64 tensors of tokens, and of the tokens that follow them.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch

from bptool.data.order import Integers, WindowOrder
from bptool.interop.token_files import Tokens

Batch = dict[str, torch.Tensor]
"""`tokens` and `targets`, int64 [B, T]: the targets are the tokens, one place on."""


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """The training batches of one rank.

    Which tokens a step sees depends on the seed and on the size of its global batch (`micro_batch_size` x
    `gradient_accumulation_steps` x `world_size`), not on how that is divided.
    """

    tokens: Tokens
    _: KW_ONLY
    sequence_length: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step`, counted from 0.

        A rank's samples are a contiguous slice of the global batch, and a micro-batch is one of those.
        """
        per_rank = self.micro_batch_size * self.gradient_accumulation_steps
        order = WindowOrder(len(self.tokens), self.sequence_length, self.seed)
        starts = order.starts((step * self.world_size + self.rank) * per_rank, per_rank)
        return _batches(self.tokens, starts, self.sequence_length, self.micro_batch_size)


def held_out_batches(tokens: Tokens, *, sequence_length: int, micro_batch_size: int, sequences: int) -> list[Batch]:
    """The same evenly spaced windows each time, none overlapping: `sequences`, or as many as `tokens` has.

    The last batch is smaller where `micro_batch_size` does not divide their number.
    """
    n_windows = (len(tokens) - 1) // sequence_length
    assert n_windows > 0
    count = min(sequences, n_windows)
    starts = np.arange(count) * n_windows // count * sequence_length
    return _batches(tokens, starts, sequence_length, micro_batch_size)


def _batches(tokens: Tokens, starts: Integers, sequence_length: int, size: int) -> list[Batch]:
    """Gather the windows that begin at `starts` (which copies, so a read-only memory map will do)."""
    windows = torch.from_numpy(tokens[starts[:, None] + np.arange(sequence_length + 1)].astype(np.int64))
    return [
        {"tokens": window_BS[:, :-1].contiguous(), "targets": window_BS[:, 1:].contiguous()}
        for window_BS in windows.split(size)
    ]
