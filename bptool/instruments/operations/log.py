"""What operations a step runs, by phase: how often, on what, and how much memory their results take.

They are noted from shapes alone, on fake tensors too, so that they can be run or reckoned up later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map  # what torch itself nests tensors with

from bptool.instruments.operations.flop_formulas import flops_of
from bptool.training.instrument import Instrument, Phase
from bptool.training.operation_mode import OperationMode

_aten = torch.ops.aten
_FREE = {_aten._unsafe_view, _aten.empty, _aten.empty_like, torch.ops.prim.device}
"""Neither reads nor writes; nor does a view."""


@dataclass(frozen=True)
class Shape:
    """A tensor to be made again."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def empty(self) -> Tensor:
        """One of this shape."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, requires_grad=self.requires_grad)


def shapes_of(nest: Any) -> Any:
    """The same nest with a `Shape` in the place of each tensor."""
    return tree_map(_shape_of, nest)


def _shape_of(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return Shape(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad)


@dataclass(eq=False)
class Operation:
    """One that was run.

    Attributes:
        call: its positional and keyword arguments, with a `Shape` in the place of each tensor.
        result_bytes: of the storages that its result is in.
        flops, traffic_bytes: what it computes, and reads and writes; both are 0 of a view.
        overwritten: whether an operation in place has written into its result since.
    """

    func: torch._ops.OpOverload
    call: Any = field(repr=False)
    result_bytes: int
    flops: int
    traffic_bytes: int
    overwritten: bool = False


class OperationLog(OperationMode, Instrument):
    """Notes what runs while it is entered, by the innermost phase that it is told of.

    Attributes:
        by_phase: the operations so far, views among them, in the order that they ran in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_phase: dict[str, list[Operation]] = {}
        self._phases: list[str] = [""]
        self._made: dict[int, Operation] = {}

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Counts what runs in it as its own."""
        return self._phase(name)

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        flops = traffic = 0
        if not func.is_view and func.overloadpacket not in _FREE:
            traffic = _bytes(args) + _bytes(result)
            flops = sum(flops_of(func, args, kwargs, result) or ())
        storages = _storages(result)
        noted = Operation(func, shapes_of((args, kwargs)), sum(storages.values()), flops, traffic)
        self.by_phase.setdefault(self._phases[-1], []).append(noted)
        if func._schema.is_mutable:
            for storage in storages.keys() & self._made.keys():
                self._made[storage].overwritten = True
        elif not func.is_view:
            self._made |= dict.fromkeys(storages, noted)
        return result


def _bytes(nest: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(nest) if isinstance(leaf, Tensor))


def _storages(nest: Any) -> dict[int, int]:
    """Their bytes, by what tells them apart as long as they live."""
    storages = (leaf.untyped_storage() for leaf in tree_leaves(nest) if isinstance(leaf, Tensor))
    return {storage._cdata: storage.nbytes() for storage in storages}
