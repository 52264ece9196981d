"""Ctrl-C and SIGTERM: the first asks the loop to save and leave, the second leaves at once; elsewhere the first does.

Python runs a signal's handler between two lines of the main thread, so not before a long backward has returned, and
what a handler raises is lost where a library catches everything while it is being imported. A thread that reads the
kernel's own note of each signal (`signal.set_wakeup_fd`) is told at once, and raises nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn, Self

from bptool.errors import EXIT_INTERRUPTED

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


class StopRequest:
    """While it is entered, remembers that the user wants to stop; `reason` is the signal's name, or empty.

    Args:
        then: what is done about the first signal.
        at_once: what is said as the second one ends the process.
    """

    def __init__(
        self,
        then: str = "saving after this step",
        at_once: str = "stopped at once; the last finished checkpoint is what a resume continues from",
    ) -> None:
        self.reason = ""
        self._then, self._at_once = then, at_once
        self._count = 0

    def __enter__(self) -> Self:
        self._watch = watching(self._told, self._handle)
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watch.__exit__(kind, error, traceback)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def _told(self, number: int) -> None:
        self._count += 1
        if self._count > 1:
            # No clean-up: it may be what hangs. Finished checkpoints are whole, whatever is cut short here.
            leave(self._at_once)
        tell(f"{signal.Signals(number).name}: {self._then}; once more leaves at once")


@contextmanager
def watching(
    told: Callable[[int], None], handle: Callable[[int, FrameType | None], None] = lambda number, frame: None
) -> Iterator[None]:
    """Call `told(number)` for each SIGINT and SIGTERM, in a thread and at once; `handle` is Python's usual handler."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_read, args=(reader, told), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


def leave(words: str) -> NoReturn:
    """End the process here and now, as interrupted."""
    show_cursor = "\x1b[?25h" if os.isatty(_STDERR) else ""  # a progress bar hides it
    tell(words + show_cursor)
    os._exit(EXIT_INTERRUPTED)


def tell(words: str) -> None:
    """To the terminal, past Python's buffers, which another thread may be writing to."""
    with suppress(OSError):
        os.write(_STDERR, f"\n{words}\n".encode())


def _read(reader: int, told: Callable[[int], None]) -> None:
    """One byte is one signal; the end comes when `watching` closes the pipe."""
    with open(reader, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] in _SIGNALS:
                told(number[0])
