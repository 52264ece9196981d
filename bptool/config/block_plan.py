"""A plan of what each block keeps for its backward, in text: `20*full+6*save_matmuls`, from the first block on.

A block that keeps the results of single operations lists them: `save:attention-1.mm-1-2-4` keeps those of its first
fused attention and of its first, second and fourth `mm`, and computes the rest again. Names are PyTorch's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import groupby
from typing import Literal, get_args

from bptool.errors import nearest

NamedPolicy = Literal[
    "none", "full", "attention", "mlp", "save_matmuls", "save_every_other_matmul", "save_attention", "offload"
]
"""Those of `activation_checkpoint.policy` that need no other key."""

BlockPolicy = str
"""What one block does: a `NamedPolicy`, or `save:` and the operations whose results it keeps."""

BLOCK_POLICIES: tuple[NamedPolicy, ...] = get_args(NamedPolicy)
"""Those that have a name."""

ALIKE_EVERYWHERE = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm", "_grouped_mm", "grouped_linear", "attention"}
)
"""Operations that have the same number in a block whether it is compiled or not: products and attention."""

_SAVE = "save:"
_OPERATIONS = re.compile(r"([A-Za-z_]\w*)((?:-[1-9]\d*)+)")


def parse_plan(text: str) -> list[BlockPolicy]:
    """Each block's policy.

    Raises:
        ValueError: the text is no plan; the message says what is wrong.
    """
    plan: list[BlockPolicy] = []
    for term in text.split("+"):
        count, times, word = term.rpartition("*")
        word, count = word.strip(), count.strip()
        if word.startswith(_SAVE):
            word = write_saved(saved_operations(word))
        elif word not in BLOCK_POLICIES:
            known = ", ".join(BLOCK_POLICIES)
            raise ValueError(f"'{word}' is none of {known}{nearest(word, BLOCK_POLICIES)}")
        if times and not (count.isascii() and count.isdigit() and int(count) > 0):
            raise ValueError(f"'{count}' is no number of blocks above 0")
        plan += [word] * (int(count) if times else 1)
    return plan


def write_plan(plan: Iterable[BlockPolicy]) -> str:
    """The shortest text of a plan."""
    return "+".join(f"{len(list(group))}*{policy}" for policy, group in groupby(plan))


def saved_operations(policy: BlockPolicy) -> frozenset[str]:
    """The operations that `save:attention-1.mm-1-2` lists: `attention-1`, `mm-1` and `mm-2`.

    Raises:
        ValueError: it lists none.
    """
    found: set[str] = set()
    for part in policy.removeprefix(_SAVE).split("."):
        match = _OPERATIONS.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"'{policy}' lists no operations; write them as in save:attention-1.mm-1-2-4")
        found |= {f"{match[1]}-{number}" for number in match[2].split("-")[1:]}
    return frozenset(found)


def is_alike(operation: str) -> bool:
    """Whether an operation has the same number in a block that is compiled, such as `mm-2`."""
    return operation.rpartition("-")[0] in ALIKE_EVERYWHERE


def not_alike(plan: str) -> list[str]:
    """Names in a plan of operations that a compiled block may run more or fewer of.

    Raises:
        ValueError: the text is no plan.
    """
    listed = {name for policy in parse_plan(plan) if policy.startswith(_SAVE) for name in saved_operations(policy)}
    return sorted(name for name in listed if not is_alike(name))


def write_saved(operations: Collection[str]) -> BlockPolicy:
    """The shortest policy that keeps their results."""
    numbers: dict[str, list[int]] = {}
    for name, _, number in (operation.rpartition("-") for operation in operations):
        numbers.setdefault(name, []).append(int(number))
    return _SAVE + ".".join("-".join([name, *map(str, sorted(own))]) for name, own in sorted(numbers.items()))
