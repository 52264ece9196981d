"""Stands in for `journal` and `measuring` until they are here; nothing else is to use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from bptool.analysis.compare.entries import Entry, Header
from bptool.analysis.question import Question
from bptool.errors import DeviceError, UsageError

_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


class Journal:
    """A header's line, and an entry's each."""

    def __init__(self, path: Path, entries: list[Entry]) -> None:
        self.path, self.entries = path, entries

    @classmethod
    def create(cls, path: Path, header: Header, *, force: bool = False) -> Self:
        """A new file."""
        path.write_text(header.model_dump_json() + "\n")
        return cls(path, [])

    @classmethod
    def resume(cls, path: Path, header: Header) -> Self:
        """One that was begun."""
        if read(path)[0] != header:
            raise UsageError(f"{path} holds another grid")
        return cls(path, read(path)[1])

    def append(self, entry: Entry) -> None:
        """Write a line."""
        self.entries.append(entry)
        with self.path.open("a") as file:
            file.write(entry.model_dump_json() + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is held."""


def read(path: Path) -> tuple[Header, list[Entry]]:
    """All lines."""
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    header, *entries = path.read_text().splitlines()
    return Header.model_validate_json(header), [_ENTRY.validate_json(line) for line in entries]


def measure_grid(
    questions: Sequence[Question | None], header: Header, journal: Journal, done: Callable[[str], None]
) -> bool:
    """Not yet."""
    raise DeviceError("rows cannot be run yet", "--predict ranks them")
