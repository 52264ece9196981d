"""The stacked area chart: its paths, read back, are the figures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st
from web_page import WebPage

from bptool.report.html.chart import Band, Detail, Instant, Limit, Series, StackedArea, show_button, stacked_area
from bptool.report.html.elements import markup

CHART = StackedArea(
    identity="held",
    description="What is held.",
    edges=(0.0, 0.25, 0.5, 1.0),
    series=[Series("low", "c-low", [100, 100, 300]), Series("high", "c-high", [0, 400, 100])],
    instants=[
        Instant("at first", []),
        Instant("then", [Detail("float32[9]", "aten.mm", "c-high", 2, 400)]),
        Instant("at last", [Detail("float32[1]", "aten.add in a", "c-low", 1, 4)]),
    ],
    bands=[Band("forward", 0, 2), Band("backward", 2, 3), Band("recompute", 1, 2, level=1)],
    shown=1,
    details_heading="largest",
    axis_label="instants",
)


def paths(figure: Element) -> dict[str, str]:
    return {path.get("class", ""): path.get("d", "") for path in figure.iter("path")}


def test_by_hand() -> None:
    """500 bytes are at most held, and a headroom of 0.12: the drawing's 1000 are 560 bytes."""
    found = paths(stacked_area(CHART))
    low = (1 - 100 / 560) * 1000, (1 - 300 / 560) * 1000
    high = (1 - 500 / 560) * 1000, (1 - 400 / 560) * 1000
    assert found["area c-low"] == f"M0 1000V{low[0]:.1f}H500V{low[1]:.1f}H1000V1000H0Z"
    assert found["area c-high"] == (
        f"M0 1000V{low[0]:.1f}H250V{high[0]:.1f}H500V{high[1]:.1f}H1000V{low[1]:.1f}H500V{low[0]:.1f}H0Z"
    )
    assert found["wash"] == "M250 0H500V1000H250Z"
    assert found["edge-line"] == "M500 0V1000"


def turning_points(path: str) -> list[tuple[float, float]]:
    """Corners of a path of horizontal and vertical lines."""
    x = y = 0.0
    corners = []
    for command, numbers in re.findall(r"([MHVZ])([-\d. ]*)", path):
        values = [float(number) for number in numbers.split()]
        if command == "M":
            x, y = values
        elif command == "H":
            (x,) = values
        elif command == "V":
            (y,) = values
        corners.append((x, y))
    return corners


def area_of(path: str) -> float:
    """By the shoelace formula."""
    corners = turning_points(path)
    pairs = zip(corners, [*corners[1:], corners[0]], strict=True)
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)) / 2


@given(columns=st.lists(st.lists(st.integers(0, 1000), min_size=3, max_size=3), min_size=1, max_size=12))
def test_areas_are_bytes_times_width(columns: list[list[int]]) -> None:
    edges = [i / len(columns) for i in range(len(columns))] + [1.0]
    series = [Series(str(i), f"c-{i}", [column[i] for column in columns]) for i in range(3)]
    instants = [Instant("", []) for _ in columns]
    chart = replace(CHART, edges=edges, series=series, instants=instants, bands=[], shown=0)
    found = paths(stacked_area(chart))
    top = max(*(sum(column) for column in columns), 1) * 1.12
    for i, one in enumerate(series):
        if path := found.get(f"area {one.kind}"):  # it reaches up to the highest of what it and those below it hold
            highest = max(sum(column[: i + 1]) for column in columns)
            assert min(y for _, y in turning_points(path)) == pytest.approx((1 - highest / top) * 1000, abs=0.06)
        expected = sum(one.values) / len(columns) / top * 1000 * 1000
        assert area_of(found.get(f"area {one.kind}", "M0 0")) == pytest.approx(expected, abs=150)  # a tenth of a place


def test_the_limit_widens_the_view() -> None:
    figure = stacked_area(replace(CHART, limit=Limit(1000, "capacity")))
    assert paths(figure)["limit-line"] == f"M0 {1000 * (1 - 1000 / 1120):.1f}H1000"
    assert "capacity" in WebPage(markup(figure)).words
    assert "limit-line" not in paths(stacked_area(CHART))


def test_ticks_stand_where_they_say() -> None:
    figure = stacked_area(CHART)
    (axis,) = (div for div in figure.iter("div") if div.get("class") == "y-axis")
    for tick in axis:
        assert tick.text is not None
        assert tick.get("style") == f"bottom:{100 * float(tick.text.removesuffix(' B')) / 560:.3f}%"
    assert [tick.text for tick in axis] == ["0", "100 B", "200 B", "300 B", "400 B", "500 B"]


def test_the_read_out_without_a_script() -> None:
    words = WebPage(markup(stacked_area(CHART))).words
    begin = words.index("At the peak")
    expected = ["At the peak", "then", "back to the peak", "held", "high", "400 B", "80.0%", "low", "100 B", "20.0%"]
    assert words[begin:] == [
        *expected, "together", "500 B", "100.0%", "largest", "400 B", "2 × ", "float32[9]", "aten.mm"
    ]  # fmt: skip


def test_what_the_script_reads() -> None:
    figure = stacked_area(CHART)
    (block,) = figure.iter("script")
    data = json.loads(block.text or "")
    texts = data["texts"]
    assert data["layers"] == [[100, 100, 300], [0, 400, 100]]
    assert [texts[i] for i in data["where"]] == ["at first", "then", "at last"]
    assert [[(texts[a], texts[b], texts[c], n, m) for a, b, c, n, m in d] for d in data["details"]] == [
        [],
        [("float32[9]", "aten.mm", "c-high", 2, 400)],
        [("float32[1]", "aten.add in a", "c-low", 1, 4)],
    ]
    assert (data["edges"], data["shown"]) == ([0.0, 0.25, 0.5, 1.0], 1)


def test_bands_are_named_and_placed() -> None:
    figure = stacked_area(CHART)
    bands = [span for span in figure.iter("span") if (span.get("class") or "").startswith("band")]
    assert [(b.get("title"), b.get("style")) for b in bands] == [
        ("forward", "left:0.000%;width:50.000%"),
        ("backward", "left:50.000%;width:50.000%"),
        ("recompute", "left:25.000%;width:25.000%"),
    ]


def test_a_button_to_an_instant() -> None:
    button = show_button(CHART, 2, "backward")
    assert (button.text, button.get("data-shows"), button.get("data-instant")) == ("backward", "held", "2")
