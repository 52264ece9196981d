"""Writing a user's file: whole or not at all, and in the words of our errors where the disk says no."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bptool.errors import StorageError

_UNFINISHED = ".writing"


@contextmanager
def writing(path: Path, then: str = "run it again") -> Iterator[None]:
    """Writing a file or a folder.

    Args:
        then: what to do once it can be.

    Raises:
        StorageError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}", f"make room or fix permissions, then {then}"
        ) from error


@contextmanager
def replacing(path: Path, then: str = "run it again") -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when all is written and on the disk.

    Until then `path` is what it was, and so it stays where anything fails or the process is killed. A file that is
    replaced hands on its permissions; a link goes on pointing where it does. Several at once: none is replaced before
    all are written. What is no ordinary file (a pipe, `/dev/stdout`) cannot be replaced, and is written to directly.

    Raises:
        StorageError: no space, no permission, no such folder, or a folder in its place.
    """
    with writing(path, then):
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not target.is_file():
            yield path
            return
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        temporary = target.with_name(f".{target.name}.{os.getpid()}{_UNFINISHED}")
        try:
            yield temporary
            if target.exists():
                shutil.copymode(target, temporary)
            flush(temporary)
            temporary.replace(target)
            flush(target.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def replace_text(path: Path, text: str, then: str = "run it again") -> None:
    """Write `text` in UTF-8, with the line ends that it has, as `replacing` does.

    Raises:
        StorageError: it could not be written; what was there before still is.
    """
    with replacing(path, then) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)


def is_unfinished(path: Path, name: str) -> bool:
    """Whether this is what a process that was killed had written, by then, of the file `name` beside it."""
    return path.name.startswith(f".{name}.") and path.name.endswith(_UNFINISHED)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
