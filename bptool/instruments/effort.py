"""How hard a step's operations are, by phase, as a roofline has it: arithmetic or memory traffic, the slower of both.

Counted from shapes alone, on fake tensors too. The unit is the time of one FLOP at the device's full matrix rate; a
byte read or written takes as long as `flops_per_byte` of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # PyTorch's documented way to see every operation
from torch.utils._pytree import tree_leaves  # what torch itself nests tensors with

from bptool.instruments.flop_formulas import flops_of
from bptool.training.instrument import Instrument, Phase

_aten = torch.ops.aten
_FREE = {_aten._unsafe_view, _aten.empty, _aten.empty_like, torch.ops.prim.device}
"""Neither reads nor writes; nor does a view."""


class Effort(TorchDispatchMode, Instrument):
    """Sums up what runs while it is entered, by the innermost phase that it is told of.

    Attributes:
        by_phase: the effort so far.
    """

    def __init__(self, flops_per_byte: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_phase: defaultdict[str, float] = defaultdict(float)
        self._flops_per_byte = flops_per_byte
        self._phases: list[str] = [""]

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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under it; PyTorch's wrapper against that costs more than the mode."""
        return False

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket not in _FREE:
            traffic = _bytes(args) + _bytes(result)
            flops = sum(flops_of(func, args, kwargs, result) or ())
            effort = max(flops, traffic * self._flops_per_byte)
            self.by_phase[self._phases[-1]] += effort
        return result


def _bytes(nest: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(nest) if isinstance(leaf, Tensor))
