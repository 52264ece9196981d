"""What a disk says no to, in the words of our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bptool.errors import StorageError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Writing a file of a run while it goes on.

    Raises:
        StorageError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror}", "make room or fix permissions, then resume the run"
        ) from error
