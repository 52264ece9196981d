"""Ctrl-C and SIGTERM: the first asks the loop to save and leave, the second leaves at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Self

from bptool.errors import EXIT_INTERRUPTED

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While it is entered, remembers that the user wants to stop; `reason` is the signal's name, or empty."""

    def __init__(self) -> None:
        self.reason = ""

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.reason:
            # No clean-up: it may be what hangs. Finished checkpoints are whole, whatever is cut short here.
            sys.stderr.write("\nstopped at once; the last finished checkpoint is what a resume continues from\n")
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
        self.reason = signal.Signals(number).name
