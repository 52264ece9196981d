"""A grid's file: JSON lines, the header first and then an entry a line, each on the disk before the next is looked for.

A NaN or infinite figure is written as a string ("nan", "-inf"), so that each line is JSON for every reader.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from pydantic import TypeAdapter, ValidationError

from bptool.analysis.compare.entries import Entry, Header
from bptool.analysis.result import Record
from bptool.errors import RunInUse, UsageError
from bptool.files import writing

FORMAT_VERSION = 1
_MAY_DIFFER = {"time_limit_s"}
"""Keys that say nothing about the figures."""
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)
_AGAIN = "write a new grid to another file, or over this one with --force"


class Journal:
    """The file of a grid that this process alone may write, and what it holds by now.

    The lock is the kernel's (`flock`) and goes with the process, however that ends.

    Attributes:
        path: the file.
        header: as it stands in the file.
    """

    def __init__(self, path: Path, header: Header, entries: Sequence[Entry], descriptor: int) -> None:
        self.path = path
        self.header = header
        self._entries = list(entries)
        self._descriptor = descriptor

    @classmethod
    def create(cls, path: Path, header: Header, *, force: bool = False) -> Self:
        """A new file that holds a header.

        Raises:
            UsageError: there is a file already, and `force` is not given.
            RunInUse: another process writes it.
            StorageError: it cannot be written.
        """
        if path.exists() and not force:
            raise UsageError(f"{path} exists already", "continue its grid with --resume, or overwrite it with --force")
        descriptor = _locked(path, os.O_RDWR | os.O_CREAT)
        try:
            with writing(path):
                os.ftruncate(descriptor, 0)
            journal = cls(path, header, (), descriptor)
            journal._write(header)
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    @classmethod
    def resume(cls, path: Path, header: Header) -> Self:
        """The file of a grid that was begun; a last line that was cut short is dropped.

        Args:
            header: of the grid that is asked for, which must be the file's in all but its time limit.

        Raises:
            UsageError: there is no such file, it is damaged, or of another grid.
            RunInUse: another process writes it.
            StorageError: it cannot be read or written.
        """
        if not path.exists():
            raise UsageError(f"there is no grid at {path} to resume", "leave --resume away to begin one")
        descriptor = _locked(path, os.O_RDWR)
        try:
            stored, entries, whole = _parsed(path, _content(path))
            _refuse_another(path, stored, header)
            with writing(path):
                os.ftruncate(descriptor, whole)
                os.lseek(descriptor, 0, os.SEEK_END)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, stored, entries, descriptor)

    @property
    def entries(self) -> list[Entry]:
        """All entries, in the order in which they were found."""
        return list(self._entries)

    def append(self, entry: Entry) -> None:
        """Write an entry; when this returns, the disk holds it.

        Raises:
            StorageError: it could not be written; the file is what it was.
        """
        self._write(entry)
        self._entries.append(entry)

    def close(self) -> None:
        """Let the file go."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: Record) -> None:
        line = _line(record)
        with writing(self.path, then="continue with --resume"):
            before = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            try:
                _write_all(self._descriptor, line)
                os.fsync(self._descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, before)
                    os.lseek(self._descriptor, before, os.SEEK_SET)
                raise


def read(path: Path) -> tuple[Header, list[Entry]]:
    """What a grid's file holds, finished or not; it may be being written meanwhile.

    Raises:
        UsageError: there is no such file, or it is no grid's, damaged, or of a newer bptool.
    """
    if not path.exists():
        raise UsageError(f"there is no file {path}", "name one that `bptool compare -o FILE` wrote")
    header, entries, _ = _parsed(path, _content(path))
    return header, entries


def _locked(path: Path, flags: int) -> int:
    with writing(path):
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise RunInUse(
                f"{path} is being written by another process", "wait for it, stop it, or choose another file"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def _write_all(descriptor: int, content: bytes) -> None:
    """A full disk may take a part of it before it says so."""
    while content:
        content = content[os.write(descriptor, content) :]


def _line(record: Record) -> bytes:
    return json.dumps(_plain(record.model_dump(mode="python")), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def _parsed(path: Path, content: bytes) -> tuple[Header, list[Entry], int]:
    """The header, the entries, and how many bytes they are: without what a kill left of a last line."""
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    if not lines:
        _refuse(path, 1, "it holds no grid's header")
    header = _header(path, lines[0])
    return header, [_entry(path, number, line, header) for number, line in enumerate(lines[1:], start=2)], whole


def _header(path: Path, line: bytes) -> Header:
    values = _object(path, 1, line)
    if values.get("kind") != "header":
        _refuse(path, 1, "it is no grid's header")
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UsageError(
            f"{path} is of a newer bptool: its format is {version}, and this one reads {FORMAT_VERSION}",
            f"read it with bptool {values.get('bptool_version', 'of that version')}",
        )
    try:
        return Header.model_validate(values)
    except ValidationError as error:
        _refuse(path, 1, _first(error))


def _entry(path: Path, number: int, line: bytes, header: Header) -> Entry:
    values = _object(path, number, line)
    try:
        entry = _ENTRY.validate_python(values)
    except ValidationError as error:
        _refuse(path, number, _first(error))
    if not 0 <= entry.row < len(header.rows):
        _refuse(path, number, f"row = {entry.row}, and the grid has rows 0 to {len(header.rows) - 1}")
    return entry


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        _refuse(path, number, f"no JSON: {error}")
    if not isinstance(values, dict):
        _refuse(path, number, f"found {type(values).__name__}, expected a JSON object")
    return values


def _refuse(path: Path, number: int, why: str) -> NoReturn:
    raise UsageError(f"{path}, line {number}: {why}", f"name a file that `bptool compare -o FILE` wrote, or {_AGAIN}")


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'the line'}: {problem['msg']}"


def _refuse_another(path: Path, stored: Header, asked: Header) -> None:
    old, new = stored.model_dump(), asked.model_dump()
    different = [key for key in old if key not in _MAY_DIFFER and old[key] != new[key]]
    if different:
        lines = [f"  {key}: {old[key]} there, {new[key]} now" for key in different]
        raise UsageError(
            "\n".join([f"{path} is of another grid:", *lines]), f"ask for the grid that it is of, or {_AGAIN}"
        )
