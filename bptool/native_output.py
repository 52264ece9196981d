"""What a native library prints by itself, kept out of standard output, which is for results alone."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def native_output_dropped() -> Iterator[None]:
    """While entered, nothing gets to the process's standard output, from whatever language or thread.

    The C library's buffer is emptied on the way in and out: in a pipe, what was printed would come later.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        kept = os.dup(1)
    except OSError:  # the process has none
        os.close(nowhere)
        yield
        return
    if sys.stdout:
        sys.stdout.flush()
    _flush()
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _flush() -> None:
    ctypes.CDLL(None).fflush(None)
