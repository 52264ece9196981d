"""A scatter of numbered points, those on a front joined by stairs. Inline SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree.ElementTree import Element

from bptool.report.axis import Axis
from bptool.report.html.elements import element, styled
from bptool.report.html.parts import swatch

_NARROW, _LOW = 520, 300  # pixels: numbers do not touch on a drawing of this size, and so on none that is larger
_LETTER, _LINE = 7.5, 14  # pixels that a digit takes
_RADIUS = 6
_NEAR = 5  # pixels from a dot's middle to the corner of its number, askew
_SAME = 4  # pixels: points that are nearer lie upon each other

_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Dot:
    """A point.

    Attributes:
        name: its number.
        detail: what the read-out says of it, in lines.
        x, y: its place, in the axes' units; it is known to lie between `x_low` and `x_high`.
        kind: CSS class that colours it.
    """

    name: str
    detail: str
    x: float
    y: float
    x_low: float
    x_high: float
    kind: str


@dataclass(frozen=True)
class ScatterPlot:
    """What the plot shows.

    Attributes:
        description: the plot in a sentence, for those who cannot see it.
        dots: the most important ones first, which get their numbers and lie above the others.
        stairs: the front's corners, from the left to the right.
        kinds: names and CSS classes of the dots' kinds.
        remarks: more words for the legend.
        limit: a height that is not to be passed, and its words.
        hint: what the read-out says where nothing is pointed at.
    """

    identity: str
    description: str
    dots: Sequence[Dot]
    stairs: Sequence[tuple[float, float]]
    x: Axis
    y: Axis
    x_label: str
    y_label: str
    kinds: Sequence[tuple[str, str]]
    remarks: Sequence[str]
    limit: tuple[float, str] | None
    hint: str


def scatter_plot(plot: ScatterPlot) -> Element:
    """The plot, its axes, its legend and its read-out."""
    y_ticks, x_ticks, lines = styled("div", "y-axis"), styled("div", "x-axis"), []
    for tick in plot.y.ticks:
        share = plot.y.share(tick.value)
        y_ticks.append(element("span", {"style": f"bottom:{100 * share:.3f}%"}, tick.label))
        lines.append(_line("gridline", (0, share), (1, share)))
    for tick in plot.x.ticks:
        share = plot.x.share(tick.value)
        x_ticks.append(element("span", {"style": f"left:{100 * share:.3f}%"}, tick.label))
        lines.append(_line("gridline", (share, 0), (share, 1)))
    drawing = element(
        "svg",
        {"role": "img", "aria-label": plot.description},
        *lines,
        *_limit(plot),
        *_stairs(plot),
        *(_whisker(plot, dot) for dot in plot.dots),
        *(_dot(plot, dot) for dot in reversed(plot.dots)),
        *_names(plot),
    )
    inside = styled("div", "plot", drawing, *_limit_label(plot))
    grid = styled("div", "chart-grid", y_ticks, inside, x_ticks, styled("p", "axis-label", plot.x_label))
    keys = [element("span", None, swatch(f"round {kind}"), name) for name, kind in plot.kinds]
    legend = styled("div", "legend", *keys, *(element("span", None, remark) for remark in plot.remarks))
    read_out = element("p", {"class": "pointed-at", "data-hint": plot.hint}, plot.hint)
    attributes = {"class": "figure scatter", "id": plot.identity}
    return element("figure", attributes, styled("p", "y-label", plot.y_label), grid, legend, read_out)


def _line(kind: str, begin: tuple[float, float], end: tuple[float, float]) -> Element:
    places = {"x1": _across(begin[0]), "y1": _down(begin[1]), "x2": _across(end[0]), "y2": _down(end[1])}
    return element("line", {"class": kind, **places})


def _across(share: float) -> str:
    return f"{100 * share:.3f}%"


def _down(share: float) -> str:
    return f"{100 * (1 - share):.3f}%"


def _place(plot: ScatterPlot, dot: Dot) -> tuple[float, float]:
    return plot.x.share(dot.x), plot.y.share(dot.y)


def _limit(plot: ScatterPlot) -> Iterator[Element]:
    if plot.limit:
        share = plot.y.share(plot.limit[0])
        yield _line("limit-line", (0, share), (1, share))


def _limit_label(plot: ScatterPlot) -> Iterator[Element]:
    if plot.limit:
        place = f"bottom:{100 * plot.y.share(plot.limit[0]):.3f}%"
        yield element("div", {"class": "limit-label", "style": place}, plot.limit[1])


def _stairs(plot: ScatterPlot) -> Iterator[Element]:
    """From each corner to the right, as far as the next one, and then down to it."""
    corners = [(plot.x.share(x), plot.y.share(y)) for x, y in plot.stairs]
    for (left, high), (right, low) in pairwise(corners):
        yield _line("stair", (left, high), (right, high))
        yield _line("stair", (right, high), (right, low))


def _whisker(plot: ScatterPlot, dot: Dot) -> Element:
    """The spread of its time."""
    height = plot.y.share(dot.y)
    return _line(f"whisker {dot.kind}", (plot.x.share(dot.x_low), height), (plot.x.share(dot.x_high), height))


def _dot(plot: ScatterPlot, dot: Dot) -> Element:
    x, y = _place(plot, dot)
    words = "\n".join(other.detail for other in [dot, *_upon(plot, dot)])
    return element(
        "circle",
        {
            "class": f"dot {dot.kind}",
            "cx": _across(x),
            "cy": _down(y),
            "r": str(_RADIUS),
            "tabindex": "0",
            "role": "img",
            "aria-label": words,
        },
        element("title", None, words),
    )


def _pixels(plot: ScatterPlot, dot: Dot) -> tuple[float, float]:
    """Its place on the smallest drawing, from the left and from the bottom."""
    x, y = _place(plot, dot)
    return x * _NARROW, y * _LOW


def _upon(plot: ScatterPlot, dot: Dot) -> list[Dot]:
    """Others that hide it or are hidden by it."""
    x, y = _pixels(plot, dot)
    others = [(other, _pixels(plot, other)) for other in plot.dots if other is not dot]
    return [other for other, (left, low) in others if abs(left - x) < _SAME and abs(low - y) < _SAME]


def _names(plot: ScatterPlot) -> Iterator[Element]:
    """Numbers beside the dots, where there is room; those of dots that hide each other on one line."""
    dots = {dot.name: _box(*_pixels(plot, dot), 2 * _RADIUS, 2 * _RADIUS) for dot in plot.dots}
    numbers: list[_Box] = []
    named: set[str] = set()
    for dot in plot.dots:
        if dot.name in named:
            continue
        together = [dot.name, *(other.name for other in _upon(plot, dot) if other.name not in named)]
        named.update(together)
        words = ", ".join(together)
        taken = [*numbers, *(box for name, box in dots.items() if name not in together)]
        spot = _spot(_pixels(plot, dot), _LETTER * len(words), taken)
        if spot:
            side, box = spot
            numbers.append(box)
            across, down = _place(plot, dot)
            attributes = {"class": "dot-name", "x": _across(across), "y": _down(down), **_standing(side)}
            yield element("text", attributes, words)


def _spot(middle: tuple[float, float], length: float, taken: Sequence[_Box]) -> tuple[str, _Box] | None:
    """A side of a dot where a number meets nothing, and what it takes there."""
    for side, (right, up) in _sides(length).items():
        box = _box(middle[0] + right, middle[1] + up, length, _LINE)
        inside = box[0] >= 0 and box[1] <= _NARROW and box[2] >= 0
        if inside and not any(_meet(box, other) for other in taken):
            return side, box
    return None


def _standing(side: str) -> dict[str, str]:
    """How a text stands to a dot."""
    return {
        "above right": {"dx": str(_NEAR), "dy": str(-_NEAR)},
        "above left": {"dx": str(-_NEAR), "dy": str(-_NEAR), "text-anchor": "end"},
        "below right": {"dx": str(_NEAR), "dy": str(_NEAR + 9)},
        "below left": {"dx": str(-_NEAR), "dy": str(_NEAR + 9), "text-anchor": "end"},
        "right": {"dx": str(_RADIUS + 3), "dy": ".35em"},
        "left": {"dx": str(-_RADIUS - 3), "dy": ".35em", "text-anchor": "end"},
    }[side]


def _sides(length: float) -> dict[str, tuple[float, float]]:
    """From a dot's middle to that of its number, in pixels to the right and upwards."""
    beside, askew, over = _RADIUS + 3 + length / 2, _NEAR + length / 2, _NEAR + _LINE / 2 - 2
    above = {"above right": (askew, over), "above left": (-askew, over)}
    below = {"below right": (askew, -over), "below left": (-askew, -over)}
    return {**above, **below, "right": (beside, 0), "left": (-beside, 0)}


def _box(x: float, y: float, width: float, height: float) -> _Box:
    """Left, right, bottom and top of what has its middle there."""
    return x - width / 2, x + width / 2, y - height / 2, y + height / 2


def _meet(one: _Box, other: _Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
