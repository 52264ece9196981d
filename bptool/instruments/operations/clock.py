"""Clocks for operations: seconds of the host, or events in a GPU's own queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Clock = Callable[[], Any]
"""Gives a mark in time; `seconds_of` tells how to read it."""


class CudaClock:
    """Marks in the current CUDA stream, whose times are known when the device has come to them.

    An operation's time is then the device's, not that of the Python which launched it; a device that waits for the host
    shows as time between operations.
    """

    def __init__(self) -> None:
        self._zero: torch.cuda.Event | None = None

    def __call__(self) -> torch.cuda.Event:
        """A mark, now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._zero is None:
            self._zero = event
        return event

    def seconds(self, mark: torch.cuda.Event) -> float:
        """Since the first mark; waits for the device, which for the last mark first is one wait for all."""
        assert self._zero is not None, "a mark was made by this clock"
        mark.synchronize()
        return float(self._zero.elapsed_time(mark)) / 1e3


def seconds_of(clock: Clock | None) -> Callable[[Any], float]:
    """How to read a clock's marks: those of a host's clock are seconds."""
    return clock.seconds if isinstance(clock, CudaClock) else float
