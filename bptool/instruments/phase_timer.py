"""How long each phase of a step takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from bptool.training.instrument import Instrument, Phase


class PhaseTimer(Instrument):
    """Sums each phase's seconds until they are collected.

    On a CPU it reads `clock`. On CUDA it records events, which cost no synchronisation while the step runs; `collect()`
    waits for them. A phase's time includes the phases inside it: `backward` holds `recompute`.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[Phase, float] = defaultdict(float)
        self._events: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Time one phase."""
        return self._cuda_phase(name) if self._on_cuda else self._cpu_phase(name)

    @contextmanager
    def _cpu_phase(self, name: Phase) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] += self._clock() - start

    @contextmanager
    def _cuda_phase(self, name: Phase) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
        finally:
            end.record()
            self._events.append((name, start, end))

    def collect(self) -> dict[Phase, float]:
        """Seconds by phase since the last call."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1e3
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds
