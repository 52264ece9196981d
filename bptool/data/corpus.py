"""Text to train on: the standard library's own source, a text file, or a folder of text.

The documents of a folder are ordered by a hash of their relative names. The order is then the same on every
file system, and the held-out tail of the token stream is a sample of them all, not the end of the alphabet.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bptool.config.schema import PYTHON_STDLIB
from bptool.data.files import existing, unreadable
from bptool.errors import DataError, StorageError
from bptool.units import format_bytes

_STDLIB_LEAVES_OUT = {
    *("site-packages", "dist-packages"),  # not the standard library
    *("test", "tests", "idlelib", "lib2to3", "turtledemo"),  # test suites and applications
}
_HEAD_BYTES = 8192


@dataclass(frozen=True)
class Corpus:
    """The documents of one source, in their order.

    `skipped` counts a folder's files that are not readable text, by reason; empty files count nowhere.
    """

    name: str
    documents: tuple[str, ...]
    n_bytes: int
    skipped: Mapping[str, int]

    @property
    def description(self) -> str:
        """`Python 3.11 standard library, 580 files, 10.49 MiB`."""
        parts = [self.name]
        if len(self.documents) > 1:
            parts.append(f"{len(self.documents)} files")
        if self.skipped:
            parts.append(f"{sum(self.skipped.values())} skipped ({_listed(self.skipped)})")
        return ", ".join([*parts, format_bytes(self.n_bytes)])


class _NotTextError(Exception):
    """A file that is no UTF-8 text; says what it is."""


def read_corpus(source: str) -> Corpus:
    """The text that `data.source` names: `python-stdlib`, a file, or a folder, read recursively.

    In a folder every file counts that is UTF-8 text, whatever its name ends with, but for hidden ones and
    those in hidden folders; links to folders are not followed.

    Raises:
        DataError: nothing is there, or nothing of it is text.
        StorageError: it cannot be read.
    """
    if source == PYTHON_STDLIB:
        return _python_stdlib()
    if not source:
        raise DataError("data.source is empty", f"data.source={PYTHON_STDLIB}, or a text file or folder")
    path = existing(Path(source), "data.source", [PYTHON_STDLIB])
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _python_stdlib() -> Corpus:
    """The source of the interpreter that runs, without test suites and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    name = f"Python {'.'.join(platform.python_version_tuple()[:2])} standard library"
    corpus = _read_all(name, root, suffix=".py", leave_out=_STDLIB_LEAVES_OUT)
    if not corpus.documents:
        raise DataError(
            f"this Python has no readable source of its standard library in '{root}'",
            "data.source=FILE or data.source=FOLDER, with text of your own",
        )
    return corpus


def _read_file(path: Path) -> Corpus:
    try:
        text, size = _read_text(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except _NotTextError as error:
        raise DataError(
            f"data.source: '{path}' is {error}; a text is UTF-8",
            "convert it (iconv -t UTF-8), or name a token file with the ending .bin",
        ) from None
    if not text:
        raise DataError(f"data.source: '{path}' is empty")
    return Corpus(path.name, (text,), size, {})


def _read_folder(path: Path) -> Corpus:
    corpus = _read_all(path.resolve().name, path)
    if corpus.documents:
        return corpus
    found = f"it holds only {_listed(corpus.skipped)}" if corpus.skipped else "it holds no file with any text"
    message = f"data.source: no text in the folder '{path}': {found}"
    if "unreadable" in corpus.skipped:
        raise StorageError(message, "check the permissions of the folder and its files")
    token_files = sorted(path.glob("*.bin"))
    raise DataError(message, f"data.source={token_files[0]} if that is a token file" if token_files else "")


def _read_all(name: str, root: Path, *, suffix: str = "", leave_out: Collection[str] = ()) -> Corpus:
    """The text below `root`, ordered by hashes of names; folders named in `leave_out` are not entered."""
    documents: list[str] = []
    skipped: Counter[str] = Counter()
    n_bytes = 0
    paths = [path for path in _files(root, leave_out, skipped) if path.name.endswith(suffix)]
    for path in sorted(paths, key=lambda path: _name_hash(path.relative_to(root))):
        try:
            text, size = _read_text(path)
        except OSError:
            skipped["unreadable"] += 1
            continue
        except _NotTextError as error:
            skipped[str(error)] += 1
            continue
        if text:
            documents.append(text)
            n_bytes += size
    return Corpus(name, tuple(documents), n_bytes, dict(skipped))


def _files(root: Path, leave_out: Collection[str], skipped: Counter[str]) -> Iterator[Path]:
    """The files below `root` that are not hidden; folders that are closed to us are counted in `skipped`."""
    for folder, subfolders, names in os.walk(root, onerror=lambda _: skipped.update(["unreadable"])):
        subfolders[:] = [name for name in subfolders if name not in leave_out and not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _name_hash(relative: Path) -> bytes:
    return hashlib.sha256(os.fsencode(relative.as_posix())).digest()


def _read_text(path: Path) -> tuple[str, int]:
    """The text of a file, line ends as they are, and its size in bytes; of a binary file the head is read."""
    if not path.is_file() and path.exists():
        raise _NotTextError("not a regular file")  # a pipe or a device would block
    with path.open("rb") as file:
        content = file.read(_HEAD_BYTES)
        if b"\0" not in content:
            content += file.read()
    if b"\0" in content:
        raise _NotTextError("binary")
    try:
        return content.decode("utf-8"), len(content)
    except UnicodeDecodeError:
        raise _NotTextError("not UTF-8") from None


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
