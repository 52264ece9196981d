"""A table whose rows can be put in order by any column; without a script it stays in the order in which it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from xml.etree.ElementTree import Element

from bptool.report.html.elements import element, styled
from bptool.report.html.parts import Column

_FEW = 6  # columns: more may be wider than the page's text


@dataclass(frozen=True)
class Figure:
    """A cell.

    Attributes:
        key: what its column is put in order by: a number, or words. Cells without one, or whose number is not finite,
            come last in either order.
        note: smaller, below.
        kind: CSS class that colours it.
    """

    text: str
    key: float | str | None
    note: str = ""
    kind: str = ""


def sortable_table(
    columns: Sequence[Column], rows: Sequence[Sequence[Figure]], emphasized: int | None = None
) -> Element:
    """The table, in order of its first column, one row of it perhaps emphasized."""
    headings = [
        element(
            "th",
            {"scope": "col", "class": column.kind, **({"aria-sort": "ascending"} if i == 0 else {})},
            element("button", {"type": "button", "class": "sorts", "disabled": ""}, column.heading),
        )
        for i, column in enumerate(columns)
    ]
    body = element("tbody")
    for i, row in enumerate(rows):
        cells = [
            _cell(figure, column, first=not j) for j, (figure, column) in enumerate(zip(row, columns, strict=True))
        ]
        body.append(element("tr", {"class": "chosen"} if i == emphasized else None, *cells))
    kind = "scrolling wide" if len(columns) > _FEW else "scrolling"
    whole = element("table", {"class": "sortable"}, element("thead", None, element("tr", None, *headings)), body)
    return element("div", {"class": kind, "tabindex": "0", "role": "group", "aria-label": "table"}, whole)


def _cell(figure: Figure, column: Column, *, first: bool) -> Element:
    attributes = {"class": " ".join(word for word in (column.kind, figure.kind) if word)}
    if isinstance(figure.key, str):
        attributes["data-key"] = figure.key
    elif figure.key is not None and isfinite(figure.key):
        attributes["data-key"] = repr(float(figure.key))
    note = [styled("div", "note", figure.note)] if figure.note else []
    head = {"scope": "row"} if first else {}
    return element("th" if first else "td", {**head, **attributes}, figure.text, *note)
