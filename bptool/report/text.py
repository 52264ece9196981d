"""Small pieces of plain text that all reports share."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence

WIDTH = 114
"""Of lines where nothing is known of what shows them."""
_ROOM = 30
"""A column of words is no narrower."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def terminal_width(unknown: int = 100, least: int = 60) -> int:
    """Columns for lines, at most 200; `unknown` where there is no terminal."""
    return max(least, min(shutil.get_terminal_size((unknown, 24)).columns, 200))


def aligned(rows: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Two columns: labels, and what they label."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{indent}{label:<{width}}  {value}" for label, value in rows)


def columns(
    rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: str = "  ", width: int | None = None
) -> str:
    """A table, its first row the heading, which is not indented; `right` are the columns set to the right.

    Args:
        width: where given, words of the last column that go beyond it are wrapped, or have lines of their own.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] += len(indent)
    lines = []
    for number, row in enumerate(rows):
        first = row[0] if number == 0 else indent + row[0]
        cells = [first, *row[1:]]
        padded = [
            f"{cell:>{width}}" if i in right else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        line = "  ".join(padded).rstrip()
        lines += [line] if width is None or len(line) <= width else _wrapped(padded[:-1], row[-1], width)
    return "\n".join(lines)


def hanging(sentence: str, width: int, indent: str = "  ") -> str:
    """A sentence in lines of at most `width` columns, the later ones further in; no word of it is broken."""
    return textwrap.fill(
        sentence,
        width,
        initial_indent=indent,
        subsequent_indent=2 * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _wrapped(cells: Sequence[str], words: str, width: int) -> list[str]:
    """A row whose last cell takes several lines: beside the others where there is room, else below them."""
    line = "  ".join(cells).rstrip()
    start = len("  ".join([*cells, ""]))
    if width - start >= _ROOM:
        return textwrap.fill(words, width, initial_indent="  ".join([*cells, ""]), subsequent_indent=" " * start).split(
            "\n"
        )
    below = " " * 6
    return [line, *textwrap.wrap(words, width, initial_indent=below, subsequent_indent=below)]


def visible(text: str) -> str:
    r"""Control characters spelt out (`\x1b`), so that a text cannot steer a terminal; line breaks and tabs stay."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def quoted(text: str) -> str:
    """Somebody's words, marked at the margin, so that none of them is taken for ours."""
    return "\n".join(f"  | {line}".rstrip() for line in visible(text).split("\n"))


def next_commands(commands: Sequence[str]) -> str:
    """What to do next, ready to paste."""
    return "\n".join(["next:", *(f"  {command}" for command in commands)])


def place(phase: str, op: str, module: str) -> str:
    """Where in a step: `forward · aten.mm in blocks.3`; what is not known is left out."""
    where = " in ".join(word for word in (op, module) if word)
    return " · ".join(word for word in (phase, where) if word)


def one_of(unit: str) -> str:
    """`tokens` to `token`, `micro-batches` to `micro-batch`: a plural that somebody named, as English makes most."""
    return unit[:-2] if unit.endswith(("ches", "shes", "xes", "sses")) else unit.removesuffix("s")
