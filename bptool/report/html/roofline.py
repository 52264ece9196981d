"""A roofline: operations as points on two logarithmic axes, below the device's two roofs. Inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from bptool.report.html.elements import element, styled
from bptool.report.html.parts import swatch

_MARGIN = 1.6  # a factor beside the outermost points and above the roof
_NAMED = 6  # of the heaviest points
_SMALLEST, _LARGEST = 3.5, 17.0  # radii in pixels


@dataclass(frozen=True)
class Point:
    """An operation.

    Attributes:
        detail: what else there is to say of it, in a line.
        x: FLOPs for each byte.
        y: FLOPs a second.
        weight: its share of all, which is its area.
        kind: CSS class that colours it.
    """

    name: str
    detail: str
    x: float
    y: float
    weight: float
    kind: str


@dataclass(frozen=True)
class RooflinePlot:
    """What the plot shows.

    Attributes:
        description: the plot in a sentence, for those who cannot see it.
        flops_per_s, bytes_per_s: the roofs.
        roofs: what to say of them, one sentence each.
        kinds: names and CSS classes of the points' kinds.
        hint: what the read-out says where nothing is pointed at.
    """

    identity: str
    description: str
    points: Sequence[Point]
    flops_per_s: float
    bytes_per_s: float
    roofs: Sequence[str]
    kinds: Sequence[tuple[str, str]]
    x_label: str
    format_x: Callable[[float], str]
    format_y: Callable[[float], str]
    hint: str


@dataclass(frozen=True)
class _Axis:
    """From `low` to `high` on a logarithmic scale."""

    low: float
    high: float

    def share(self, value: float) -> float:
        return math.log(value / self.low) / math.log(self.high / self.low)

    def decades(self, most: int) -> list[float]:
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        every = max(1, math.ceil((last - first + 1) / most))
        return [10.0**power for power in range(first, last + 1) if power % every == 0]


def roofline(plot: RooflinePlot) -> Element:
    """The plot, its axes, its legend and its read-out."""
    x_axis, y_axis = _axes(plot)
    y_ticks, x_ticks = styled("div", "y-axis"), styled("div", "x-axis")
    lines = []
    for value in y_axis.decades(6):
        y_ticks.append(element("span", {"style": f"bottom:{100 * y_axis.share(value):.3f}%"}, plot.format_y(value)))
        lines.append(_line("gridline", 0, y_axis.share(value), 1, y_axis.share(value)))
    for value in x_axis.decades(7):
        x_ticks.append(element("span", {"style": f"left:{100 * x_axis.share(value):.3f}%"}, plot.format_x(value)))
        lines.append(_line("gridline", x_axis.share(value), 0, x_axis.share(value), 1))
    ordered = sorted(plot.points, key=lambda point: -point.weight)  # the small ones above the large
    drawing = element(
        "svg",
        {"role": "img", "aria-label": plot.description},
        *lines,
        *_roofs(plot, x_axis, y_axis),
        *(_dot(point, x_axis, y_axis) for point in ordered),
        *_names(ordered, x_axis, y_axis),
    )
    grid = styled("div", "chart-grid", y_ticks, styled("div", "plot", drawing), x_ticks)
    grid.append(styled("p", "axis-label", plot.x_label))
    keys = [element("span", None, swatch(kind), name) for name, kind in plot.kinds]
    keys += [
        element("span", None, element("span", {"class": "roof-key", "aria-hidden": "true"}), roof)
        for roof in plot.roofs
    ]
    read_out = element("p", {"class": "pointed-at", "data-hint": plot.hint}, plot.hint)
    attributes = {"class": "figure roofline", "id": plot.identity}
    return element("figure", attributes, grid, styled("div", "legend", *keys), read_out)


def _axes(plot: RooflinePlot) -> tuple[_Axis, _Axis]:
    """Around all points and the corner where the roofs meet, at least two powers of ten each."""
    ridge = plot.flops_per_s / plot.bytes_per_s
    xs = [point.x for point in plot.points]
    low, high = min([ridge / 40, *xs]) / _MARGIN, max([ridge * 10, *xs]) * _MARGIN
    ys = [point.y for point in plot.points]
    bottom, top = min([low * plot.bytes_per_s, *ys]) / _MARGIN, max([plot.flops_per_s, *ys]) * _MARGIN
    return _Axis(low, high), _Axis(bottom, top)


def _roofs(plot: RooflinePlot, x_axis: _Axis, y_axis: _Axis) -> Iterator[Element]:
    """Memory up to the ridge, arithmetic from there on."""
    ridge = x_axis.share(plot.flops_per_s / plot.bytes_per_s)
    top = y_axis.share(plot.flops_per_s)
    yield _line("roof", 0, y_axis.share(x_axis.low * plot.bytes_per_s), ridge, top)
    yield _line("roof", ridge, top, 1, top)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Element:
    ends = {"x1": _across(x1), "y1": _down(y1), "x2": _across(x2), "y2": _down(y2)}
    return element("line", {"class": kind, **ends})


def _across(share: float) -> str:
    return f"{100 * share:.3f}%"


def _down(share: float) -> str:
    return f"{100 * (1 - share):.3f}%"


def _dot(point: Point, x_axis: _Axis, y_axis: _Axis) -> Element:
    words = f"{point.name}: {point.detail}"
    return element(
        "circle",
        {
            "class": f"dot {point.kind}",
            "cx": _across(x_axis.share(point.x)),
            "cy": _down(y_axis.share(point.y)),
            "r": f"{_radius(point):.1f}",
            "tabindex": "0",
            "role": "img",
            "aria-label": words,
        },
        element("title", None, words),
    )


def _radius(point: Point) -> float:
    return max(_SMALLEST, _LARGEST * math.sqrt(point.weight))


def _names(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis) -> Iterator[Element]:
    """Names beside the heaviest points, but none upon another."""
    taken: list[tuple[float, float]] = []
    for point in points[:_NAMED]:
        x, y = x_axis.share(point.x), y_axis.share(point.y)
        if any(abs(x - left) < 0.22 and abs(y - low) < 0.06 for left, low in taken):
            continue
        taken.append((x, y))
        beside = _radius(point) + 4
        side = {"dx": f"{-beside:.1f}", "text-anchor": "end"} if x > 0.7 else {"dx": f"{beside:.1f}"}
        yield element("text", {"class": "dot-name", "x": _across(x), "y": _down(y), "dy": ".35em", **side}, point.name)
