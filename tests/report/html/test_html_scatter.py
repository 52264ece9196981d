"""The scatter on a page: places on its axes, stairs, numbers that do not touch."""

from __future__ import annotations

import random
from dataclasses import replace
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.report.axis import axis_around
from bptool.report.html.scatter import Dot, ScatterPlot, scatter_plot
from bptool.report.scale import SECOND_UNITS


def dot(name: str, x: float, y: float) -> Dot:
    return Dot(name, f"row {name}", x, y, 0.9 * x, 1.1 * x, "is-front")


DOTS = [dot("1", 1.0, 3.0), dot("2", 2.0, 2.0), dot("3", 3.0, 1.0)]
PLOT = ScatterPlot(
    identity="plot",
    description="Three rows.",
    dots=DOTS,
    stairs=[(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)],
    x=axis_around([0.9, 3.3], SECOND_UNITS, 5),
    y=axis_around([1.0, 3.0], SECOND_UNITS, 5),
    x_label="time",
    y_label="height",
    kinds=[("on the front", "is-front")],
    remarks=[],
    limit=(2.5, "limit 2.5"),
    hint="Point.",
)


def percent(element: Element, name: str) -> float:
    return float((element.get(name) or "").removesuffix("%"))


def ticks(figure: Element, kind: str, side: str) -> list[tuple[float, float]]:
    (axis,) = (div for div in figure.iter("div") if div.get("class") == kind)
    found = [((s.get("style") or "").removeprefix(f"{side}:").removesuffix("%"), s.text or "") for s in axis]
    return [(float(place), float(text.removesuffix(" s"))) for place, text in found]


def value_at(shown: list[tuple[float, float]], place: float) -> float:
    """From the first and the last tick, on the straight line through both."""
    (first, low), (second, high) = shown[0], shown[-1]
    return low + (place - first) * (high - low) / (second - first)


def lines(figure: Element, kind: str) -> list[Element]:
    return [line for line in figure.iter("line") if (line.get("class") or "").split()[0] == kind]


@given(x=st.floats(1.0, 3.0), y=st.floats(1.0, 3.0))
def test_points_stand_where_the_axes_say(x: float, y: float) -> None:
    figure = scatter_plot(replace(PLOT, dots=[dot("1", x, y)]))
    across, up = ticks(figure, "x-axis", "left"), ticks(figure, "y-axis", "bottom")
    (circle,), (whisker,) = list(figure.iter("circle")), lines(figure, "whisker")
    assert value_at(across, percent(circle, "cx")) == pytest.approx(x, abs=1e-3)
    assert value_at(up, 100 - percent(circle, "cy")) == pytest.approx(y, abs=1e-3)
    assert value_at(across, percent(whisker, "x1")) == pytest.approx(0.9 * x, abs=1e-3)
    assert value_at(across, percent(whisker, "x2")) == pytest.approx(1.1 * x, abs=1e-3)
    assert whisker.get("y1") == whisker.get("y2") == circle.get("cy")


def test_stairs_go_right_and_then_down() -> None:
    figure = scatter_plot(PLOT)
    across, up = ticks(figure, "x-axis", "left"), ticks(figure, "y-axis", "bottom")
    path = [
        tuple(
            round(value_at(axis, place), 2)
            for axis, place in zip((across, up, across, up), (x1, 100 - y1, x2, 100 - y2), strict=True)
        )
        for line in lines(figure, "stair")
        for x1, y1, x2, y2 in [[percent(line, name) for name in ("x1", "y1", "x2", "y2")]]
    ]
    assert path == [(1, 3, 2, 3), (2, 3, 2, 2), (2, 2, 3, 2), (3, 2, 3, 1)]
    (limit,) = lines(figure, "limit-line")
    assert value_at(up, 100 - percent(limit, "y1")) == pytest.approx(2.5, abs=1e-3)


def test_dots_upon_each_other_are_read_out_together() -> None:
    figure = scatter_plot(replace(PLOT, dots=[*DOTS, dot("4", 2.001, 2.001)]))
    assert [circle.findtext("title") for circle in figure.iter("circle")] == [
        *("row 4\nrow 2", "row 3", "row 2\nrow 4", "row 1")
    ]
    assert [text.text for text in figure.iter("text")] == ["1", "2, 4", "3"]


def test_numbers_do_not_touch() -> None:
    """On a drawing of the least size: no number upon another, nor upon a dot that is not its own."""
    chance = random.Random(0)
    dots = [dot(str(i), chance.uniform(1, 3), chance.uniform(1, 3)) for i in range(60)]
    plot = replace(PLOT, dots=dots, stairs=[])
    figure = scatter_plot(plot)
    boxes = []
    for text in figure.iter("text"):
        x, y = 520 * percent(text, "x") / 100, 300 * percent(text, "y") / 100
        length = 7 * len(text.text or "")
        begin = x + float(text.get("dx") or 0) - (length if text.get("text-anchor") == "end" else 0)
        down = 4 if text.get("dy") == ".35em" else float(text.get("dy") or 0)
        boxes.append((begin, begin + length, y + down - 9, y + down, text.text))
    assert len(boxes) > 20
    for box in boxes:
        for other in boxes:
            assert box is other or not (
                box[0] < other[1] and other[0] < box[1] and box[2] < other[3] and other[2] < box[3]
            ), (box, other)
