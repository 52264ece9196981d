"""An icicle: what is inside a part hangs below it, as wide as its share. Inline SVG that reads without a script.

Each slab is an SVG inside the SVG, placed in percent, so the picture fills whatever width there is and its words keep
their size. A script zooms and reads out; without one a pointer still gets a slab's title.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from bptool.report.html.elements import data_block, element, styled
from bptool.report.html.parts import swatch

_ROW, _GROUND, _STRIP = 36, 34, 7  # pixels: from row to row, a slab, and its strip of colours
_CHARACTER = 0.72  # percent of a usual page's width, for a character and its share of the margins
_LEAST = 1e-4  # a share of the whole that is still drawn


@dataclass(frozen=True)
class Slab:
    """A part of the whole.

    Attributes:
        note: what it is, in a few words, for its read-out.
        weight: what it is as wide as; those of its children add up to it or less.
        amounts: of its strip, by kind.
        figures: for the read-out: a row for each kind, and one for all together.
    """

    name: str
    note: str
    weight: float
    amounts: Sequence[float]
    figures: Sequence[Sequence[str]]
    children: Sequence[Slab] = field(default_factory=tuple)


@dataclass(frozen=True)
class Icicle:
    """What the picture shows.

    Attributes:
        identity: `id` of its element.
        description: the picture in a sentence, for those who cannot see it.
        kinds: names and CSS classes, in the order of a slab's amounts.
        headings: of the figures' columns.
    """

    identity: str
    description: str
    root: Slab
    kinds: Sequence[tuple[str, str]]
    headings: Sequence[str]


class _Placed(NamedTuple):
    slab: Slab
    left: float
    width: float
    """Shares of the whole."""
    level: int


def icicle(picture: Icicle) -> Element:
    """The picture, its legend and its read-out."""
    placed = list(_placed(picture.root, 0.0, 1.0, 0))
    height = _ROW * (1 + max(one.level for one in placed))
    drawing = element(
        "svg",
        {"class": "slabs", "height": str(height), "role": "img", "aria-label": picture.description},
        *(_drawn(one, number, picture) for number, one in enumerate(placed)),
    )
    keys = [element("span", None, swatch(kind), name) for name, kind in picture.kinds]
    return element(
        "figure",
        {"class": "figure icicle", "id": picture.identity},
        drawing,
        styled("div", "legend", *keys),
        _read_out(picture),
        data_block(_data(placed)),
    )


def _placed(slab: Slab, left: float, width: float, level: int) -> Iterator[_Placed]:
    """Parents before their children, and each row from the left to the right."""
    if width < _LEAST:
        return
    yield _Placed(slab, left, width, level)
    for child in slab.children:
        share = width * child.weight / slab.weight if slab.weight else 0.0
        yield from _placed(child, left, share, level + 1)
        left += share


def _drawn(placed: _Placed, number: int, picture: Icicle) -> Element:
    slab = placed.slab
    room = 100 * placed.width / _CHARACTER
    words = next((words for words in _words(placed) if len(words) <= room), "")
    place = {"x": _percent(placed.left), "y": str(_ROW * placed.level), "width": _percent(placed.width)}
    return element(
        "svg",
        {"class": "slab", "data-slab": str(number), **place, "height": str(_GROUND)},
        element("title", None, f"{slab.name}: {placed.width:.1%}"),
        element("rect", {"class": "ground", "width": "100%", "height": str(_GROUND)}),
        *_strips(slab, picture),
        element("text", {"x": "6", "y": "17"}, words),
    )


def _words(placed: _Placed) -> tuple[str, str]:
    """What a slab says of itself, the longer first."""
    return f"{placed.slab.name} {placed.width:.1%}", placed.slab.name


def _strips(slab: Slab, picture: Icicle) -> Iterator[Element]:
    total, done = sum(slab.amounts), 0.0
    for amount, (_, kind) in zip(slab.amounts, picture.kinds, strict=True):
        if amount:
            share = {"x": _percent(done / total), "width": _percent(amount / total)}
            yield element(
                "rect", {"class": f"strip {kind}", **share, "y": str(_GROUND - _STRIP), "height": str(_STRIP)}
            )
        done += amount


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"


def _read_out(picture: Icicle) -> Element:
    """The root's figures; the script fills in any other's."""
    body = element("tbody")
    names = [element("th", {"scope": "row"}, swatch(kind), name) for name, kind in picture.kinds]
    for name, figures in zip([*names, element("th", {"scope": "row"}, "together")], picture.root.figures, strict=True):
        body.append(element("tr", None, name, *(styled("td", "number", figure) for figure in figures)))
    head = element("tr", None, element("th"), *(styled("th", "number", heading) for heading in picture.headings))
    where = styled(
        "p",
        "where",
        styled("strong", "moment", picture.root.name),
        styled("span", "place", picture.root.note),
        element("button", {"type": "button", "class": "release", "hidden": ""}, "back to the whole"),
    )
    return styled("div", "read-out", where, element("table", None, element("thead", None, head), body))


def _data(placed: Sequence[_Placed]) -> dict[str, Any]:
    return {
        "left": [round(one.left, 6) for one in placed],
        "width": [round(one.width, 6) for one in placed],
        "level": [one.level for one in placed],
        "words": [list(_words(one)) for one in placed],
        "note": [one.slab.note for one in placed],
        "figures": [[list(row) for row in one.slab.figures] for one in placed],
    }
