"""Rows of stacked bars on one scale, each with a mark of its own; read out under a pointer or by keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from bptool.report.html.elements import element, styled
from bptool.report.html.parts import Piece, swatch


@dataclass(frozen=True)
class Stack:
    """A bar.

    Attributes:
        detail: what the read-out says of it, in lines.
        figure: what stands at its end.
        mark: a place on its scale to mark; None: none.
    """

    name: str
    detail: str
    pieces: Sequence[Piece]
    figure: str
    mark: float | None


@dataclass(frozen=True)
class Stacks:
    """What is shown.

    Attributes:
        description: the bars in a sentence, for those who cannot see them.
        kinds: names and CSS classes of the pieces' kinds.
        mark_name: what the marks are; empty where there are none.
        limit: a place on the scale that is not to be passed, and its words.
        hint: what the read-out says where nothing is pointed at.
    """

    description: str
    stacks: Sequence[Stack]
    kinds: Sequence[tuple[str, str]]
    mark_name: str
    limit: tuple[float, str] | None
    hint: str


def stacked_bars(shown: Stacks) -> Element:
    """The bars, their legend and their read-out."""
    ends = [max(sum(piece.amount for piece in one.pieces), one.mark or 0.0) for one in shown.stacks]
    scale = max([1.0, *ends])
    limit = shown.limit if shown.limit and shown.limit[0] <= scale else None
    rows = [_row(one, scale, limit[0] if limit else None) for one in shown.stacks]
    keys = [element("span", None, swatch(kind), name) for name, kind in shown.kinds]
    if shown.mark_name:
        keys.append(
            element("span", None, element("span", {"class": "limit-key", "aria-hidden": "true"}), shown.mark_name)
        )
    if limit:
        key = element("span", {"class": "limit-key fit", "aria-hidden": "true"})
        keys.append(element("span", None, key, limit[1]))
    read_out = element("p", {"class": "pointed-at", "data-hint": shown.hint}, shown.hint)
    group = element("div", {"role": "group", "aria-label": shown.description}, *rows)
    return element("figure", {"class": "figure stacks"}, styled("div", "legend", *keys), group, read_out)


def _row(one: Stack, scale: float, limit: float | None) -> Element:
    track = element("span", {"class": "track", "aria-hidden": "true"})
    for piece in one.pieces:
        width = f"width:{100 * piece.amount / scale:.3f}%"
        track.append(element("span", {"class": f"piece {piece.kind}", "style": width, "title": piece.label}))
    if limit is not None:
        track.append(element("span", {"class": "limit fit", "style": f"left:{100 * limit / scale:.3f}%"}))
    if one.mark is not None:
        track.append(element("span", {"class": "limit", "style": f"left:{100 * one.mark / scale:.3f}%"}))
    name = element("span", {"class": "one-line", "title": one.name}, one.name)
    attributes = {"class": "stack", "tabindex": "0", "role": "img", "aria-label": one.detail}
    return element("div", attributes, name, track, styled("span", "number", one.figure))
