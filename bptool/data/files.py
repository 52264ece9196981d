"""Finding and replacing a user's files, with the errors that say what went wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from bptool.errors import DataError, StorageError, nearest


def existing(path: Path, what: str, words: Iterable[str] = ()) -> Path:
    """`path`, if there is anything at it.

    Args:
        path: what the user asked for; a leading `~` is the home folder.
        what: the key or kind of file, for the message.
        words: what could have been meant instead of a path.

    Raises:
        DataError: nothing is there; the message names the nearest word or file beside it.
        StorageError: nobody can tell, because a folder on the way is closed to us.
    """
    path = path.expanduser()
    try:
        if path.exists():
            return path
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        raise unreadable(path, error) from error
    raise DataError(f"{what}: '{path}' does not exist{nearest(path.name, [*words, *siblings])}")


def unreadable(path: Path, error: OSError) -> StorageError:
    """The error to raise for a file that exists and cannot be read."""
    return StorageError(f"'{path}' cannot be read: {error.strerror or error}")


def replace_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name, flush it, and rename: `path` is whole, old or new.

    Raises:
        StorageError: no space, no permission, no such folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"'{path}' cannot be written: {error.strerror or error}") from error
