"""Tables and sentences that keep to a width: columns that matter less are left out, long words are wrapped."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from bptool.report.text import columns

_ROOM_FOR_WORDS = 24  # for less, words stand on lines of their own
_CUT = "…"

Rows = Sequence[Sequence[str]]


def table(
    rows: Rows, *, width: int, right: Sequence[int] = (), leave_out: Sequence[Sequence[int]] = (), words: bool = False
) -> str:
    """A table as `columns` makes it, no line wider than `width`.

    Args:
        rows: the first one is the heading.
        right: the columns set to the right.
        leave_out: columns that may go where there is no room, those of the first group first; besides these, columns
            whose cells are all empty always do. Names in the first column are cut to a third of the width before, and
            further at last.
        words: the last column holds sentences, which are wrapped.
    """
    sentences = [row[-1] for row in rows] if words else []
    kept = [i for i in range(len(rows[0]) - words) if i == 0 or any(row[i] for row in rows[1:])]
    if _needed(rows, kept) > width:
        rows = _with_names_cut(rows, max(width // 3, _ROOM_FOR_WORDS))
    most = width - 2 - _ROOM_FOR_WORDS if words and width > 3 * _ROOM_FOR_WORDS else width
    for gone in leave_out:
        if _needed(rows, kept) <= most:
            break
        kept = [i for i in kept if i not in gone]
    if (excess := _needed(rows, kept) - width) > 0:
        rows = _with_names_cut(rows, max(len(row[0]) for row in rows) - excess)
    names = [row[0] for row in rows]
    cells = [[name, *(row[i] for i in kept[1:])] for name, row in zip(names, rows, strict=True)]
    text = columns(cells, right=[kept.index(i) for i in right if i in kept])
    return _beside(text.split("\n"), sentences, width) if words else text


def sentence(text: str, width: int, indent: str = "  ") -> str:
    """Words wrapped to the width, all lines indented."""
    return textwrap.fill(text, max(width, 20), initial_indent=indent, subsequent_indent=indent)


def labelled(rows: Sequence[tuple[str, str]], width: int) -> str:
    """Two columns as `aligned` makes them, what is labelled wrapped."""
    head = max(len(label) for label, _ in rows)
    lines = [f"  {label:<{head}}" for label, _ in rows]
    return _beside(lines, [words for _, words in rows], width)


def _needed(rows: Rows, kept: Sequence[int]) -> int:
    """Characters: the columns, two blanks between them and two before the first."""
    return sum(max(len(row[i]) for row in rows) for i in kept) + 2 * len(kept)


def _with_names_cut(rows: Rows, length: int) -> Rows:
    return [[_cut(row[0], length), *row[1:]] for row in rows]


def _cut(text: str, length: int) -> str:
    """The longer part of the beginning, and of the end what is left room for."""
    if len(text) <= length:
        return text
    end = max(length - 1, 1) // 3
    return text[: max(length - 1, 1) - end] + _CUT + text[len(text) - end :]


def _beside(lines: Sequence[str], sentences: Sequence[str], width: int) -> str:
    """Each line with its sentence to the right of all lines, or below its own where there is no room."""
    at = max(map(len, lines)) + 2
    if width - at < _ROOM_FOR_WORDS:
        pairs = zip(lines, sentences, strict=True)
        return "\n".join(
            "\n".join([line, *([sentence(words, width, "    ")] if words else [])]) for line, words in pairs
        )
    found = []
    for line, words in zip(lines, sentences, strict=True):
        wrapped = textwrap.wrap(words, width - at) or [""]
        found.append(f"{line:<{at}}{wrapped[0]}".rstrip())
        found += [" " * at + more for more in wrapped[1:]]
    return "\n".join(found)
