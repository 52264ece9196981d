"""Ticks by hand, and what holds of all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.report.axis import byte_ticks
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
    places = [tick.n_bytes for tick in ticks]
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
