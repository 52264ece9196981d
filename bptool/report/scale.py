"""One unit for a column of figures, so that they can be compared at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Units = Sequence[tuple[float, str]]
"""Sizes and names, the largest first."""

FLOP_UNITS: Units = (
    *((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")),
    *((1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1.0, "FLOP")),
)
SECOND_UNITS: Units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_LEAST = 10  # of the largest figure: two decimals show a thousandth of it


class Scale(NamedTuple):
    """A unit and its size."""

    size: float
    unit: str

    def text(self, value: float) -> str:
        """`1,342.18`: the figure without its unit; nothing at all is `0`."""
        return f"{value / self.size:,.2f}" if value else "0"


def scale_of(largest: float, units: Units) -> Scale:
    """The unit in which the largest figure of a column has two places or more before the point."""
    return next((Scale(*unit) for unit in units if abs(largest) >= _LEAST * unit[0]), Scale(*units[-1]))
