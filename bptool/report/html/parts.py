"""The parts that pages are made of, besides charts: tiles, tables, trees that fold, meters, commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.etree.ElementTree import Element

from bptool.report.html.elements import element, styled


@dataclass(frozen=True)
class Tile:
    """A key figure.

    Attributes:
        note: in a few words, what to make of it.
    """

    label: str
    value: str
    note: str = ""


def tiles(figures: Sequence[Tile]) -> Element:
    """Key figures side by side."""
    made = styled("dl", "tiles")
    for figure in figures:
        note = [styled("dd", "note", figure.note)] if figure.note else []
        made.append(styled("div", "tile", element("dt", None, figure.label), element("dd", None, figure.value), *note))
    return made


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        kind: a number is set to the right; what is aside is left out where there is little room; words get most of it.
    """

    heading: str
    kind: Literal["text", "number", "aside", "aside number", "words"] = "text"


Cell = Element | str


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], emphasized: int | None = None) -> Element:
    """A plain table, one row of it perhaps emphasized. The first cell of a row names it."""
    kinds = [column.kind for column in columns]
    headings = [
        element("th", {"scope": "col", "class": kind}, column.heading)
        for column, kind in zip(columns, kinds, strict=True)
    ]
    body = element("tbody")
    for i, row in enumerate(rows):
        cells = [
            element("td", {"class": kind}, cell) if number else element("th", {"scope": "row", "class": kind}, cell)
            for number, (kind, cell) in enumerate(zip(kinds, row, strict=True))
        ]
        body.append(element("tr", {"class": "emphasized"} if i == emphasized else None, *cells))
    whole = element("table", None, element("thead", None, element("tr", None, *headings)), body)
    return styled("div", "scrolling", whole)


def bar(share: float, kind: str = "plain") -> Element:
    """A share of the whole, 0 to 1, as a bar; a figure stands beside it, so it says nothing to a screen reader."""
    inside = element("span", {"class": kind, "style": f"width:{100 * min(max(share, 0.0), 1.0):.2f}%"})
    return element("span", {"class": "bar", "aria-hidden": "true"}, inside)


def swatch(kind: str) -> Element:
    """The colour of a series, before its name."""
    return element("span", {"class": f"swatch {kind}", "aria-hidden": "true"})


@dataclass(frozen=True)
class Node:
    """A row of a tree table.

    Attributes:
        cells: one for each column after the name.
    """

    name: str
    cells: Sequence[Sequence[Cell]]
    children: Sequence[Node] = field(default_factory=tuple)


def tree_table(columns: Sequence[Column], root: Node, open_levels: int = 2) -> Element:
    """A table whose rows fold: nested `details`, which need no script and answer to the keyboard.

    Args:
        columns: the first one heads the names.
        open_levels: how many levels of rows are visible at first.
    """
    head = styled("div", "tree-row tree-head", *(element("span", None, column.heading) for column in columns))
    unfold = element("button", {"type": "button", "class": "unfold", "hidden": ""}, "Unfold all")
    attributes = {"class": "tree", "style": f"--cells:{len(columns) - 1}"}
    return element("div", attributes, unfold, head, _branch(root, 0, open_levels - 1))


def _branch(node: Node, level: int, open_levels: int) -> Element:
    name = element("span", {"class": "tree-name", "style": f"--level:{level}"}, element("code", None, node.name))
    cells = [styled("span", "tree-cell", *cell) for cell in node.cells]
    if not node.children:
        return styled("div", "tree-row tree-leaf", name, *cells)
    return element(
        "details",
        {"open": ""} if open_levels > 0 else None,
        styled("summary", "tree-row", name, *cells),
        *(_branch(child, level + 1, open_levels - 1) for child in node.children),
    )


@dataclass(frozen=True)
class Piece:
    """A part of a meter.

    Attributes:
        kind: CSS class that colours it.
    """

    label: str
    amount: float
    kind: str


def meter(pieces: Sequence[Piece], limit: float | None, limit_label: str) -> Element:
    """Amounts end to end on one bar, against a limit that they may pass."""
    total = sum(piece.amount for piece in pieces)
    scale = max(total, limit or 0.0, 1.0)
    track = styled("div", "track")
    for piece in pieces:
        track.append(
            element("span", {"class": f"piece {piece.kind}", "style": f"width:{100 * piece.amount / scale:.3f}%"})
        )
    if limit is not None:
        track.append(element("span", {"class": "limit", "style": f"left:{100 * limit / scale:.3f}%"}))
    legend = styled("div", "legend", *(element("span", None, swatch(p.kind), p.label) for p in pieces))
    if limit is not None:
        key = element("span", {"class": "limit-key", "aria-hidden": "true"})
        legend.append(element("span", None, key, limit_label))
    return styled("div", "meter", track, legend)


def command_line(command: str) -> Element:
    """A command to copy: one click selects all of it."""
    return styled("pre", "command", element("code", None, command))


def bullets(lines: Sequence[str]) -> Element:
    """Sentences, one below the other."""
    return element("ul", None, *(element("li", None, line) for line in lines))
