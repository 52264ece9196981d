"""Selective recomputation: which operations of a block keep their results, so that the backward computes the rest.

PyTorch's `create_selective_checkpoint_contexts` asks for each operation, in the forward (and in PyTorch 2.11 in the
recomputation once more, in the same order).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from bptool.errors import UsageError
from bptool.model.grouped import GROUPED_LINEAR

_aten = torch.ops.aten
_ATTENTION: Mapping[torch._ops.OpOverload, int] = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
    _aten._scaled_dot_product_flash_attention.default: 3,
    _aten._scaled_dot_product_efficient_attention.default: 5,
    _aten._scaled_dot_product_cudnn_attention.default: 5,
    _aten._scaled_dot_product_fused_attention_overrideable.default: 4,
}
"""PyTorch's fused attention on each device, and which argument is its dropout."""

_MATMULS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.convolution.default,
        _aten._scaled_mm.default,
        _aten._grouped_mm.default,
        GROUPED_LINEAR,
    }
)


class Attention:
    """Saves the result of fused attention alone; attention that is written out has no such operation."""

    def __call__(self, func: torch._ops.OpOverload) -> bool:
        """Whether this operation, the block's next, is saved."""
        return func in _ATTENTION


class Matmuls(Attention):
    """Saves matrix products too.

    Args:
        every: of the products the first of each so many.
    """

    def __init__(self, every: int = 1) -> None:
        self._every, self._count = every, 0

    def __call__(self, func: torch._ops.OpOverload) -> bool:
        """Whether this operation, the block's next, is saved."""
        if func not in _MATMULS:
            return super().__call__(func)
        self._count += 1
        return self._count % self._every == 1 % self._every


Chooser = Callable[[torch._ops.OpOverload], bool]
"""Whether an operation's result is saved; asked for each in turn."""


def selective_contexts(
    chooser: Callable[[], Chooser],
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Contexts of one forward, and of its recomputation, which then finds what was saved.

    Args:
        chooser: makes a new one.
    """
    contexts: tuple[AbstractContextManager[object], AbstractContextManager[object]]
    contexts = create_selective_checkpoint_contexts(Policy(chooser))
    return contexts


class Policy:
    """A chooser that keeps random numbers in step, as PyTorch asks for it.

    A saved operation is not run again, and draws no random numbers the second time. Where it drew some the first time
    (attention with dropout), what is drawn after it is saved as well.
    """

    def __init__(self, chooser: Callable[[], Chooser]) -> None:
        self._choosers = {recompute: chooser() for recompute in (False, True)}
        self._ahead = dict.fromkeys(self._choosers, False)

    def __call__(
        self, context: SelectiveCheckpointContext, func: torch._ops.OpOverload, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        """Whether the result of `func(*args, **kwargs)` is saved."""
        again = bool(context.is_recompute)
        saved = self._choosers[again](func)
        if _draws(func, args):
            saved = saved or self._ahead[again]
            if saved and func.overloadpacket.__name__.endswith("_"):
                raise UsageError(
                    f"selective recomputation cannot repeat the random numbers of {func}, which writes in place,"
                    " after attention with dropout",
                    "use activation_checkpoint.policy=full, or no dropout in attention",
                )
            self._ahead[again] = saved
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether it draws random numbers, of which attention without dropout is tagged as capable."""
    position = _ATTENTION.get(func)
    if position is not None:
        return len(args) > position and bool(args[position])
    return torch.Tag.nondeterministic_seeded in func.tags
