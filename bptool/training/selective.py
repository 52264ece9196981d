"""Selective recomputation: which operations of a block keep their results, so that the backward computes the rest.

PyTorch's `create_selective_checkpoint_contexts` does so too; what it asks itself for each operation took a small model
three times as long as what is recomputed. Here it is asked once: in the forward, of operations that compute something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # what torch itself nests tensors with
from torch.utils.checkpoint import SAC_IGNORED_OPS

from bptool.errors import TargetError, UsageError
from bptool.model.grouped import GROUPED_LINEAR
from bptool.training.operation_mode import OperationMode

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

_CAST = "_to_copy"
"""What casts: there in some precisions only."""

Operator = torch._ops.OpOverload
Chooser = Callable[[Operator], bool]
"""Whether an operation's result is saved; asked for each of a block in turn, but for views."""


class NotRepeated(TargetError):
    """A block's recomputation is not its forward again."""


class Attention:
    """Saves the result of fused attention alone; attention that is written out has no such operation."""

    def __call__(self, func: Operator) -> bool:
        """Whether this operation, the block's next, is saved."""
        return func in _ATTENTION


class Matmuls(Attention):
    """Saves matrix products too.

    Args:
        every: of the products the first of each so many.
    """

    def __init__(self, every: int = 1) -> None:
        self._every, self._count = every, 0

    def __call__(self, func: Operator) -> bool:
        """Whether this operation, the block's next, is saved."""
        if func not in _MATMULS:
            return super().__call__(func)
        self._count += 1
        return self._count % self._every == 1 % self._every


class Numbering:
    """Names a block's operations in turn: `mm-1`, `mm-2`, `attention-1` ..., products and attention alike everywhere.

    Of other operations a GPU, or a compiled block, may run more or fewer.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """How many of each there were so far."""

    def __call__(self, func: Operator) -> str:
        """The name of this operation, the block's next."""
        name = nature(func).name
        self.counts[name] += 1
        return f"{name}-{self.counts[name]}"


class Named:
    """Saves the results of operations that are listed by their names.

    Args:
        names: as `Numbering` gives them; a number that a block does not get to is saved nowhere.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._numbered = names, Numbering()

    def __call__(self, func: Operator) -> bool:
        """Whether this operation, the block's next, is saved."""
        return self._numbered(func) in self._names

    def refuse_unknown(self) -> None:
        """At the end of a block.

        Raises:
            TargetError: it runs nothing that is listed. Some may be missing: what runs depends on the device, on
                dropout, and casts on the precision.
        """
        listed = {name.rpartition("-")[0] for name in self._names}
        run = self._numbered.counts
        if listed.isdisjoint({*run, _CAST}):
            known = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in sorted(run.items()))
            raise TargetError(
                f"activation_checkpoint.plan saves {', '.join(sorted(listed))}, which a block does not run",
                f"it runs {known}; write them with their numbers, as in save:mm-1-2",
            )


class Nature(NamedTuple):
    """What an operation is.

    Attributes:
        name: PyTorch's, `attention` for all that are fused attention.
        counts: whether it computes something: neither a view, nor a question about a tensor.
        in_place: whether it writes into what it is given.
        dropout: the argument that says whether it draws random numbers, if it is one that may; None: `draws` says it.
    """

    name: str
    counts: bool
    in_place: bool
    dropout: int | None
    draws: bool

    def draws_with(self, args: tuple[Any, ...]) -> bool:
        """Whether it draws random numbers, of which attention without dropout is tagged as capable."""
        if self.dropout is not None:
            return len(args) > self.dropout and bool(args[self.dropout])
        return self.draws


@cache
def nature(func: Operator) -> Nature:
    """Of an operation; it is asked for each that runs."""
    dropout = _ATTENTION.get(func)
    return Nature(
        name=func.overloadpacket.__name__ if dropout is None else "attention",
        counts=not (func.is_view or func in SAC_IGNORED_OPS),
        in_place=func._schema.is_mutable,
        dropout=dropout,
        draws=torch.Tag.nondeterministic_seeded in func.tags,
    )


def selective_contexts(
    chooser: Callable[[], Chooser],
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Contexts of one forward, and of its recomputation, which then finds what was saved.

    Args:
        chooser: makes a new one.
    """
    first = _First(chooser())
    return first, _Again(first)


class _Mode(OperationMode):
    """Sees each operation that is run while it is entered."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled inside of it stays compiled; to the mode it is no operation."""
        return True


class _First(_Mode):
    """The forward: saves what is chosen.

    A saved operation is not run again, and draws no random numbers the second time. Where it drew some the first time
    (attention with dropout), what is drawn after it is saved as well.

    Attributes:
        run: the operations so far that count; `kept`: the results that were saved, by their places in it.
    """

    def __init__(self, chooser: Chooser) -> None:
        super().__init__()
        self.run: list[Operator] = []
        self.kept: dict[int, Any] = {}
        self._chooser, self._ahead = chooser, False

    def __torch_dispatch__(
        self, func: Operator, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        known = nature(func)
        if known.counts:
            if self._saves(func, known, args):
                self.kept[len(self.run)] = tree_map(_Kept, result)
            self.run.append(func)
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if error[0] is None and isinstance(self._chooser, Named):
            self._chooser.refuse_unknown()

    def _saves(self, func: Operator, known: Nature, args: tuple[Any, ...]) -> bool:
        saved = self._chooser(func)
        if known.draws_with(args):
            saved = saved or self._ahead
            if saved and known.in_place:
                raise UsageError(
                    f"selective recomputation cannot repeat the random numbers of {func}, which writes in place,"
                    " after attention with dropout",
                    "use activation_checkpoint.policy=full, or no dropout in attention",
                )
            self._ahead = saved
        return saved and not known.in_place


class _Again(_Mode):
    """The recomputation: what was saved is found, once; the rest is run."""

    def __init__(self, first: _First) -> None:
        super().__init__()
        self._first, self._count = first, 0

    def __torch_dispatch__(
        self, func: Operator, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if nature(func).counts:
            place, self._count = self._count, self._count + 1
            if place >= len(self._first.run) or self._first.run[place] is not func:
                _refuse_other_operations(func)
            kept = self._first.kept.pop(place, None)
            if kept is not None:
                return tree_map(_Kept.tensor, kept, is_leaf=lambda leaf: isinstance(leaf, _Kept))
        return func(*args, **kwargs) if kwargs else func(*args)


class _Kept:
    """A part of a result, aside from autograd's own record of it, which would hold it and be held by it."""

    __slots__ = ("_value", "_version")

    def __init__(self, part: Any) -> None:
        self._value, self._version = part, None
        if isinstance(part, Tensor):
            # As PyTorch's own does: views of it below autograd share its version counter.
            with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
                self._value = part.detach()
            self._version = part._version

    def tensor(self) -> Any:
        """What was saved.

        Raises:
            NotRepeated: something was written into it since.
        """
        if self._version is not None and self._value._version != self._version:
            raise NotRepeated(
                "selective recomputation: a saved result was written into by a later operation in place",
                "use activation_checkpoint.policy=full, or an operation that is not in place",
            )
        return self._value


def _refuse_other_operations(func: Operator) -> NoReturn:
    raise NotRepeated(
        f"selective recomputation: {func} is run at a place where the forward ran another operation, or none",
        "a block that does not repeat itself cannot be recomputed: use activation_checkpoint.policy=none",
    )
