"""Finding a user's files, with the errors that say what went wrong."""

from __future__ import annotations

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
