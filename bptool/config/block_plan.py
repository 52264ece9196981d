"""A plan of what each block keeps for its backward, in text: `20*full+6*save_matmuls`, from the first block on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Literal, get_args

from bptool.errors import nearest

BlockPolicy = Literal[
    "none", "full", "attention", "mlp", "save_matmuls", "save_every_other_matmul", "save_attention", "offload"
]
"""What one block does; those of `activation_checkpoint.policy` that need no other key."""

BLOCK_POLICIES: tuple[BlockPolicy, ...] = get_args(BlockPolicy)
"""All of them."""


def parse_plan(text: str) -> list[BlockPolicy]:
    """Each block's policy.

    Raises:
        ValueError: the text is no plan; the message says what is wrong.
    """
    plan: list[BlockPolicy] = []
    for term in text.split("+"):
        count, times, word = term.rpartition("*")
        word, count = word.strip(), count.strip()
        if word not in BLOCK_POLICIES:
            known = ", ".join(BLOCK_POLICIES)
            raise ValueError(f"'{word}' is none of {known}{nearest(word, BLOCK_POLICIES)}")
        if times and not (count.isascii() and count.isdigit() and int(count) > 0):
            raise ValueError(f"'{count}' is no number of blocks above 0")
        plan += [word] * (int(count) if times else 1)
    return plan


def write_plan(plan: Iterable[BlockPolicy]) -> str:
    """The shortest text of a plan."""
    return "+".join(f"{len(list(group))}*{policy}" for policy, group in groupby(plan))
