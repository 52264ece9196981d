"""The roofline: places on its logarithmic axes, by hand."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.report.html.roofline import Point, RooflinePlot, roofline

PLOT = RooflinePlot(
    identity="roof",
    description="Operations.",
    points=[Point("mm", "much", 100.0, 50e9, 0.64, "c-forward"), Point("add", "little", 0.25, 2e9, 0.0001, "c-dgrad")],
    flops_per_s=100e9,
    bytes_per_s=10e9,
    roofs=["flat", "slanted"],
    kinds=[("forward", "c-forward")],
    x_label="FLOPs a byte",
    format_x=lambda value: f"{value:g}",
    format_y=lambda value: f"{value:g} FLOP/s",
    hint="Point.",
)


def percent(element: Element, name: str) -> float:
    return float((element.get(name) or "").removesuffix("%"))


def value_of(shares: list[tuple[float, float]], at: float) -> float:
    """The value at a share of an axis, from two of its ticks: logarithms lie on a line."""
    (first, low), (second, high) = shares
    slope = (log(high) - log(low)) / (second - first)
    return exp(log(low) + (at - first) * slope)


def ticks(figure: Element, kind: str, side: str) -> list[tuple[float, float]]:
    (axis,) = (div for div in figure.iter("div") if div.get("class") == kind)
    found = [((s.get("style") or "").removeprefix(f"{side}:").removesuffix("%"), s.text or "") for s in axis]
    return [(float(place), float(text.removesuffix(" FLOP/s"))) for place, text in found]


@given(x=st.floats(0.01, 1e4), y=st.floats(1e6, 1e11))
def test_points_stand_where_the_axes_say(x: float, y: float) -> None:
    figure = roofline(replace(PLOT, points=[Point("p", "", x, y, 0.5, "c")]))
    (dot,) = figure.iter("circle")
    across, up = ticks(figure, "x-axis", "left"), ticks(figure, "y-axis", "bottom")
    assert value_of([across[0], across[-1]], percent(dot, "cx")) == pytest.approx(x, rel=0.01)
    assert value_of([up[0], up[-1]], 100 - percent(dot, "cy")) == pytest.approx(y, rel=0.01)
    assert 0 < percent(dot, "cx") < 100
    assert 0 < percent(dot, "cy") < 100


def test_roofs_meet_at_the_ridge() -> None:
    figure = roofline(PLOT)
    slanted, flat = (line for line in figure.iter("line") if line.get("class") == "roof")
    assert (slanted.get("x2"), slanted.get("y2")) == (flat.get("x1"), flat.get("y1"))
    assert flat.get("y1") == flat.get("y2")
    across, up = ticks(figure, "x-axis", "left"), ticks(figure, "y-axis", "bottom")
    assert value_of([across[0], across[-1]], percent(flat, "x1")) == pytest.approx(10, rel=0.01)
    assert value_of([up[0], up[-1]], 100 - percent(flat, "y1")) == pytest.approx(100e9, rel=0.01)
    begin = value_of([across[0], across[-1]], 0)
    assert value_of([up[0], up[-1]], 100 - percent(slanted, "y1")) == pytest.approx(begin * 10e9, rel=0.01)


def test_areas_are_weights_and_the_smallest_can_still_be_seen() -> None:
    big, small = (float(dot.get("r") or 0) for dot in roofline(PLOT).iter("circle"))
    assert [big, small] == pytest.approx([17.0 * 0.8, 3.5])


def test_what_can_be_read_without_a_script() -> None:
    figure = roofline(PLOT)
    assert [dot.findtext("title") for dot in figure.iter("circle")] == ["mm: much", "add: little"]
    assert [text.text for text in figure.iter("text")] == ["mm", "add"]
    crowd = replace(PLOT, points=[PLOT.points[0], replace(PLOT.points[0], name="bmm", weight=0.1)])
    assert [text.text for text in roofline(crowd).iter("text")] == ["mm"]  # one name there is enough
