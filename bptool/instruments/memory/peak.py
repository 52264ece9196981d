"""The measured peak of one step's memory, from the allocator itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bptool.training.instrument import Instrument, Phase


class PeakMemory(Instrument):
    """Measures one step: on CUDA by the allocator's own counter, on a CPU by its allocation events.

    The CPU's allocator counts nothing by itself; it reports each allocation and release while a profiler listens, which
    slows that one step down. What was allocated before is added from the tensors that hold it.

    Args:
        persistent: gives the tensors that live through the step (weights, buffers, optimizer state).
        measured_step: which step to measure, counted from 0 by the steps seen. The second is the first that holds the
            optimizer's state from its start.

    Attributes:
        peak_bytes: most bytes that were allocated at once, or None until the step has run.
    """

    def __init__(
        self, device: torch.device, persistent: Callable[[], Iterable[torch.Tensor]], measured_step: int = 1
    ) -> None:
        self.peak_bytes: int | None = None
        self._device = device
        self._persistent = persistent
        self._steps_left = measured_step

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Measure the chosen step; see nothing of the others."""
        if name != "step":
            return nullcontext()
        self._steps_left -= 1
        if self._steps_left != -1:
            return nullcontext()
        return self._measure_cuda() if self._device.type == "cuda" else self._measure_cpu()

    @contextmanager
    def _measure_cuda(self) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self.peak_bytes = torch.cuda.max_memory_allocated(self._device)

    @contextmanager
    def _measure_cpu(self) -> Iterator[None]:
        before = unique_storage_bytes(self._persistent())
        with noted_allocations() as changes:
            yield
        self.peak_bytes = before + highest_sum(changes)


@contextmanager
def noted_allocations() -> Iterator[list[int]]:
    """A list that holds, when it ends, the bytes that the CPU allocated (positive) and released (negative), in order.

    The public trace file holds the same events as JSON; reading them here saves writing and parsing megabytes.
    """
    changes: list[int] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes notes to stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield changes
    assert profiler.profiler is not None
    recorded: Any = profiler.profiler.kineto_results
    events = [event for event in recorded.events() if event.name() == "[memory]"]
    changes += [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def highest_sum(changes: Iterable[int]) -> int:
    """The most that they ever add up to, from 0."""
    highest = total = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


def unique_storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())
