"""Ticks by hand, and what holds of all."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.report.axis import BYTE_UNITS, axis_around, byte_ticks
from bptool.report.scale import SECOND_UNITS
from bptool.units import GIB, KIB, MIB, TIB


@pytest.mark.parametrize(
    ("top", "most", "labels"),
    [
        (3.4 * GIB, 6, ["0", "0.5 GiB", "1 GiB", "1.5 GiB", "2 GiB", "2.5 GiB", "3 GiB"]),
        (3.5 * GIB, 6, ["0", "1 GiB", "2 GiB", "3 GiB"]),
        (120 * MIB, 6, ["0", "20 MiB", "40 MiB", "60 MiB", "80 MiB", "100 MiB", "120 MiB"]),
        (80 * GIB, 4, ["0", "20 GiB", "40 GiB", "60 GiB", "80 GiB"]),
        (1.5 * TIB, 4, ["0", "0.5 TiB", "1 TiB", "1.5 TiB"]),
        (1023 * KIB, 2, ["0", "500 KiB", "1000 KiB"]),
        (7, 3, ["0", "2 B", "4 B", "6 B"]),
        (0, 5, ["0"]),
    ],
)
def test_by_hand(top: float, most: int, labels: list[str]) -> None:
    assert [tick.label for tick in byte_ticks(top, most)] == labels


@given(top=st.floats(0, 2.0**55), most=st.integers(2, 12))
def test_ticks_are_few_even_and_where_they_say(top: float, most: int) -> None:
    ticks = byte_ticks(top, most)
    places = [tick.value for tick in ticks]
    assert len(ticks) - 1 <= most
    assert places[-1] <= top
    units = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
    for place, tick in zip(places[1:], ticks[1:], strict=True):
        number, unit = tick.label.split()
        assert float(number) * units[unit] == pytest.approx(place)
    if top >= 1:
        assert len(ticks) > 1
        assert top - places[-1] < places[1] * 1.001
        assert places == pytest.approx([i * places[1] for i in range(len(places))])


@pytest.mark.parametrize(
    ("values", "most", "labels"),
    [
        ([0.08, 0.16], 5, ["80 ms", "100 ms", "120 ms", "140 ms", "160 ms"]),
        ([1.21, 1.24], 5, ["1.21 s", "1.22 s", "1.23 s", "1.24 s"]),
        ([0.5, 1.9], 4, ["0.5 s", "1 s", "1.5 s", "2 s"]),
        ([0.2, 2.0], 4, ["0", "1 s", "2 s"]),
        ([2e-6], 3, ["2 µs"]),
        ([1e-3, 1.0], 4, ["1 ms", "10 ms", "100 ms", "1 s"]),
        (
            [1e-3, 1.0],
            12,
            ["1 ms", "2 ms", "5 ms", *("10 ms", "20 ms", "50 ms"), *("100 ms", "200 ms", "500 ms"), "1 s"],
        ),
    ],
)
def test_an_axis_around_values_by_hand(values: list[float], most: int, labels: list[str]) -> None:
    assert [tick.label for tick in axis_around(values, SECOND_UNITS, most).ticks] == labels


def test_bytes_on_a_logarithmic_axis() -> None:
    axis = axis_around([100 * MIB, 2 * GIB], BYTE_UNITS, 4)
    assert axis.logarithmic
    assert [tick.label for tick in axis.ticks] == ["100 MiB", "300 MiB", "1 GiB"]
    assert axis.share(800 * MIB) - axis.share(400 * MIB) == pytest.approx(axis.share(400 * MIB) - axis.share(200 * MIB))


@given(values=st.lists(st.floats(1e-5, 1e5), min_size=1, max_size=6), most=st.integers(3, 12))
def test_an_axis_shows_all_and_its_ticks_are_where_they_say(values: list[float], most: int) -> None:
    axis = axis_around(values, SECOND_UNITS, most)
    shares = [axis.share(value) for value in values]
    assert 0 < min(shares) <= max(shares) < 1
    assert 1 <= len(axis.ticks) <= most
    for tick in axis.ticks:
        number, _, unit = tick.label.partition(" ")
        seconds = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "": 0.0}[unit]
        assert float(number) * seconds == pytest.approx(tick.value)
        assert -1e-9 <= axis.share(tick.value) <= 1 + 1e-9
    steps = [axis.share(b.value) - axis.share(a.value) for a, b in pairwise(axis.ticks)]
    assert all(step > 0 for step in steps)
    if not axis.logarithmic:
        assert steps == pytest.approx([steps[0]] * len(steps) if steps else [])
