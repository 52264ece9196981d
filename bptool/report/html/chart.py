"""A stacked area chart of bytes over a step: inline SVG that reads without a script, and tells more under a pointer.

Only the areas are SVG, stretched to whatever width there is; words stand around and over them as HTML, so they keep
their size on a narrow screen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from bptool.report.axis import byte_ticks
from bptool.report.html.elements import data_block, element, styled
from bptool.report.html.parts import swatch
from bptool.units import format_bytes

_SIDE = 1000  # of the drawing's square, whatever its size on the screen
_HEADROOM = 1.12  # above the highest, for its label


@dataclass(frozen=True)
class Series:
    """One layer of the stack.

    Attributes:
        kind: CSS class that colours it.
        values: bytes at each instant.
    """

    name: str
    kind: str
    values: Sequence[int]


@dataclass(frozen=True)
class Detail:
    """Something that is held at an instant, `count` times, `n_bytes` together.

    Attributes:
        what, where: in words, one line each.
        kind: CSS class of the series that it is part of.
    """

    what: str
    where: str
    kind: str
    count: int
    n_bytes: int


@dataclass(frozen=True)
class Instant:
    """What the read-out says of one instant, besides the layers."""

    where: str
    details: Sequence[Detail]


@dataclass(frozen=True)
class Band:
    """A stretch of the axis with a name: instants `begin` to `end`, without `end`; level 1 lies within level 0."""

    label: str
    begin: int
    end: int
    level: int = 0


@dataclass(frozen=True)
class Limit:
    """A height that the stack had better not reach."""

    n_bytes: int
    label: str


@dataclass(frozen=True)
class StackedArea:
    """What the chart shows.

    Attributes:
        identity: `id` of its element, by which a button refers to it.
        description: the chart in a sentence, for those who cannot see it.
        edges: where each instant begins as a share of the width, and 1.0 at last.
        series: from the bottom to the top.
        shown: the instant that is marked, and read out as long as no other is pointed at.
        details_heading: what the details are.
        axis_label: what the horizontal axis counts.
    """

    identity: str
    description: str
    edges: Sequence[float]
    series: Sequence[Series]
    instants: Sequence[Instant]
    bands: Sequence[Band]
    shown: int
    details_heading: str
    axis_label: str
    limit: Limit | None = None

    @property
    def totals(self) -> list[int]:
        """Bytes of all layers at each instant."""
        return [sum(values) for values in zip(*(series.values for series in self.series), strict=True)]


def stacked_area(chart: StackedArea) -> Element:
    """The chart, its bands, its legend and its read-out."""
    top = max(*chart.totals, chart.limit.n_bytes if chart.limit else 0, 1) * _HEADROOM
    y_axis, lines = styled("div", "y-axis"), []
    for tick in byte_ticks(top, 6):
        y_axis.append(element("span", {"style": f"bottom:{100 * tick.value / top:.3f}%"}, tick.label))
        lines.append(_line("gridline", f"M0 {_y(tick.value, top)}H{_SIDE}"))
    areas = list(_areas(chart, top))
    view = {"viewBox": f"0 0 {_SIDE} {_SIDE}", "preserveAspectRatio": "none"}
    drawing = element(
        "svg",
        {**view, "role": "img", "aria-label": chart.description},
        *lines,
        *_washes(chart),
        *areas,
        *_edges_of_bands(chart),
        *([_line("limit-line", f"M0 {_y(chart.limit.n_bytes, top)}H{_SIDE}")] if chart.limit else []),
    )
    plot = styled("div", "plot", drawing, *_labels(chart, top), element("div", {"class": "crosshair", "hidden": ""}))
    bands = styled("div", "bands", *(_band(chart, band) for band in chart.bands))
    grid = styled("div", "chart-grid", y_axis, plot, bands, _axis_label(chart))
    attributes = {"class": "chart", "id": chart.identity}
    return element("figure", attributes, grid, _read_out(chart), data_block(_data(chart)))


def show_button(chart: StackedArea, instant: int, text: str) -> Element:
    """A button that reads out an instant of the chart; without a script it is words."""
    attributes = {"type": "button", "class": "shows", "disabled": "", "data-shows": chart.identity}
    return element("button", {**attributes, "data-instant": str(instant)}, text)


def _y(value: float, top: float) -> str:
    return f"{_SIDE * (1 - value / top):.1f}".removesuffix(".0")


def _x(share: float) -> str:
    return f"{_SIDE * share:.2f}".rstrip("0").rstrip(".")


def _line(kind: str, path: str) -> Element:
    return element("path", {"class": kind, "d": path, "vector-effect": "non-scaling-stroke"})


def _areas(chart: StackedArea, top: float) -> Iterator[Element]:
    """Each layer between the height of those below it and its own; flat from one edge to the next."""
    floor = [0] * len(chart.instants)
    for series in chart.series:
        ceiling = [low + value for low, value in zip(floor, series.values, strict=True)]
        if ceiling != floor:
            path = f"M0 {_SIDE}{_stairs(chart.edges, ceiling, top)}{_stairs_back(chart.edges, floor, top)}Z"
            yield element("path", {"class": f"area {series.kind}", "d": path})
        floor = ceiling


def _stairs(edges: Sequence[float], heights: Sequence[int], top: float) -> str:
    """Left to right: up or down to each height, then along it."""
    path, last = "", ""
    for edge, height in zip(edges, heights, strict=False):
        y = _y(height, top)
        if y != last:
            path += (f"H{_x(edge)}" if last else "") + f"V{y}"
            last = y
    return path + f"H{_SIDE}"


def _stairs_back(edges: Sequence[float], heights: Sequence[int], top: float) -> str:
    path, last = "", ""
    for edge, height in zip(reversed(edges[1:]), reversed(heights), strict=True):
        y = _y(height, top)
        if y != last:
            path += (f"H{_x(edge)}" if last else "") + f"V{y}"
            last = y
    return path + "H0"


def _washes(chart: StackedArea) -> Iterator[Element]:
    """A tint behind each inner band."""
    for band in chart.bands:
        if band.level:
            left, right = _x(chart.edges[band.begin]), _x(chart.edges[band.end])
            yield element("path", {"class": "wash", "d": f"M{left} 0H{right}V{_SIDE}H{left}Z"})


def _edges_of_bands(chart: StackedArea) -> Iterator[Element]:
    ends = {chart.edges[i] for band in chart.bands if not band.level for i in (band.begin, band.end)}
    for edge in sorted(ends - {0.0, 1.0}):
        yield _line("edge-line", f"M{_x(edge)} 0V{_SIDE}")


def _labels(chart: StackedArea, top: float) -> Iterator[Element]:
    """The mark of the shown instant, and the limit's words."""
    middle = (chart.edges[chart.shown] + chart.edges[chart.shown + 1]) / 2
    height = chart.totals[chart.shown]
    side = "to-left" if middle > 0.5 else "to-right"
    place = f"left:{100 * middle:.3f}%;bottom:{100 * height / top:.3f}%"
    yield element("div", {"class": f"mark {side}", "style": place}, styled("span", "mark-label", format_bytes(height)))
    if chart.limit:
        place = f"bottom:{100 * chart.limit.n_bytes / top:.3f}%"
        yield element("div", {"class": f"limit-label {side}", "style": place}, chart.limit.label)


def _band(chart: StackedArea, band: Band) -> Element:
    left, right = chart.edges[band.begin], chart.edges[band.end]
    place = f"left:{100 * left:.3f}%;width:{100 * (right - left):.3f}%"
    kind = "band inner" if band.level else "band"
    return element("span", {"class": kind, "style": place, "title": band.label}, "" if band.level else band.label)


def _axis_label(chart: StackedArea) -> Element:
    """What the axis counts, and a key of the inner bands, which are too narrow for their names."""
    inner = dict.fromkeys(band.label for band in chart.bands if band.level)
    keys = [element("span", {"class": "inner-key"}, swatch("c-inner"), label) for label in inner]
    return styled("p", "axis-label", *keys, chart.axis_label)


def _read_out(chart: StackedArea) -> Element:
    """Legend and figures of the shown instant; the script fills in any other's."""
    total = chart.totals[chart.shown]
    body = element("tbody")
    for i, series in reversed(list(enumerate(chart.series))):
        value = series.values[chart.shown]
        body.append(_layer_row([swatch(series.kind), series.name], str(i), value, total))
    body.append(_layer_row(["together"], "total", total, total))
    details = element("tbody", {"class": "details"})
    for number in range(max(len(instant.details) for instant in chart.instants)):
        found = chart.instants[chart.shown].details
        details.append(_detail_row(found[number] if number < len(found) else None))
    where = styled(
        "p",
        "where",
        styled("strong", "moment", "At the peak"),
        styled("span", "place", chart.instants[chart.shown].where),
        element("button", {"type": "button", "class": "release", "hidden": ""}, "back to the peak"),
    )
    layers = element("table", None, element("caption", None, "held"), body)
    largest = element("table", None, element("caption", None, chart.details_heading), details)
    return styled("div", "read-out", where, styled("div", "side-by-side", layers, largest))


def _layer_row(name: Sequence[Element | str], key: str, value: int, total: int) -> Element:
    return element(
        "tr",
        {"data-layer": key},
        element("th", {"scope": "row"}, *name),
        styled("td", "number", format_bytes(value)),
        styled("td", "number share", f"{value / max(total, 1):.1%}"),
    )


def _detail_row(detail: Detail | None) -> Element:
    if detail is None:
        return element("tr", None, element("td"), element("td"))
    times = f"{detail.count} × " if detail.count > 1 else ""
    what = styled("div", "one-line", swatch(detail.kind), times, element("code", None, detail.what))
    where = element("div", {"class": "one-line muted", "title": detail.where}, element("code", None, detail.where))
    return element("tr", None, styled("td", "number", format_bytes(detail.n_bytes)), element("td", None, what, where))


def _data(chart: StackedArea) -> dict[str, Any]:
    """For the script: what differs between instants; texts are listed once and referred to by number."""
    texts: dict[str, int] = {}

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    where = [number(instant.where) for instant in chart.instants]
    details = [
        [[number(d.what), number(d.where), number(d.kind), d.count, d.n_bytes] for d in instant.details]
        for instant in chart.instants
    ]
    return {
        "edges": list(chart.edges),
        "shown": chart.shown,
        "layers": [list(series.values) for series in chart.series],
        "where": where,
        "details": details,
        "texts": list(texts),
    }
