"""A ledger of live storages: what a step holds, counted without allocating it.

Under `FakeTensorMode` tensors have shapes and no memory; the ledger sees every operation's results, counts each storage
once, and takes it off when the last tensor on it dies. That is what an allocator does, so the peak is the allocator's,
but for buffers that a kernel allocates and frees inside one operation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # PyTorch's documented way to see every operation
from torch.utils._pytree import tree_leaves

from bptool.training.instrument import Instrument, Phase


class MemoryLedger(TorchDispatchMode, Instrument):
    """Bytes of live storages, now and at most.

    Attributes:
        live_bytes: what is held now.
        peaks_bytes: most that was held during each phase, innermost phase only, and `step` for the whole step; a phase
            entered again (the next step's) starts anew.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peaks_bytes: dict[Phase, int] = {}
        self._phases: list[Phase] = []
        self._known: set[int] = set()

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before the ledger watched."""
        for tensor in tensors:
            self._note(tensor)

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Keep a peak for the phase."""
        return self._phase(name)

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        if name == "step":
            self.peaks_bytes.clear()
        self._phases.append(name)
        self._raise_peak()
        try:
            yield
        finally:
            self._phases.pop()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self._phases[-1:] == ["optimizer"]:
            return 1.0  # an update rule may scale by a value that it reads (Adafactor); no shape depends on it
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # the storage's Python object lives as long as the storage does
        if key in self._known:
            return
        n_bytes = storage.nbytes()
        self._known.add(key)
        self.live_bytes += n_bytes
        self._raise_peak()
        weakref.finalize(storage, self._forget, key, n_bytes)

    def _forget(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= n_bytes

    def _raise_peak(self) -> None:
        for phase in {"step", *self._phases[-1:]} if self._phases else ():
            self.peaks_bytes[phase] = max(self.peaks_bytes.get(phase, 0), self.live_bytes)
