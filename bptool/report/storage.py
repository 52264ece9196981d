"""What a disk says no to, in the words of our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bptool.errors import StorageError


@contextmanager
def writing(path: Path, then: str = "resume the run") -> Iterator[None]:
    """Writing a file.

    Args:
        then: what to do once it can be.

    Raises:
        StorageError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror}", f"make room or fix permissions, then {then}"
        ) from error
