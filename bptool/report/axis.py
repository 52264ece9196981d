"""Round places on an axis, for pictures on a page and in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bptool.report.scale import Units
from bptool.units import GIB, KIB, MIB, TIB

BYTE_UNITS: Units = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1, "B"))
_STEPS = [m * 10**power for power in range(-1, 9) for m in (1, 2, 5)]
_FROM_ZERO = 0.15  # of the largest: where the smallest lies lower, an axis that leaves out 0 saves little room
_LOGARITHMIC = 12.0  # times the smallest: what is less than the largest by more would be in a heap beside 0
_BESIDE = 0.08  # of the axis, free at each end
_MANTISSAS = ((1, 2, 5), (1, 3), (1,))


class Tick(NamedTuple):
    """A place on the axis, and what it says."""

    value: float
    label: str


class Axis(NamedTuple):
    """From `low` to `high`, with round places in between."""

    low: float
    high: float
    logarithmic: bool
    ticks: Sequence[Tick]

    def share(self, value: float) -> float:
        """How far along the axis a value lies: 0 at the low end, 1 at the high one."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def byte_ticks(top: float, most: int) -> list[Tick]:
    """Ticks from 0 to at most `top` bytes, besides the 0 `most` (2 or more) of them or fewer, all in one binary unit.

    They are multiples of 1, 2 or 5 times a power of ten of the unit: `0`, `0.5 GiB`, `1 GiB`.
    """
    size, unit = next(((size, unit) for size, unit in BYTE_UNITS if top >= size), BYTE_UNITS[-1])
    steps = [step for step in _STEPS if size > 1 or step >= 1]
    step = next(step for step in steps if top / size / step < most + 1)
    values = [i * step for i in range(1, int(top / size / step) + 1)]
    return [Tick(0.0, "0"), *(Tick(value * size, f"{value:.10g} {unit}") for value in values)]


def axis_around(values: Sequence[float], units: Units, most: int) -> Axis:
    """An axis that shows all of some positive values, with `most` (3 or more) ticks or fewer.

    It begins at 0 where little room is lost by that, and is logarithmic where the values are of several sizes.
    """
    least, largest = min(values), max(values)
    if largest > _LOGARITHMIC * least:
        beside = (largest / least) ** _BESIDE
        low, high = least / beside, largest * beside
        return Axis(low, high, True, _decades(low, high, units, most))
    span = largest if least < _FROM_ZERO * largest else (largest - least) or 0.2 * largest
    low = 0.0 if least < _FROM_ZERO * largest else max(least - _BESIDE * span, 0.0)
    high = largest + _BESIDE * span
    return Axis(low, high, False, _even(low, high, units, most))


def _even(low: float, high: float, units: Units, most: int) -> list[Tick]:
    """Multiples of 1, 2 or 5 times a power of ten, in the largest unit that the high end holds one of."""
    size, unit = next(((size, unit) for size, unit in units if high >= size), units[-1])
    power = math.floor(math.log10((high - low) / size / most))
    step = next(
        s for s in (m * 10.0**p for p in (power, power + 1) for m in (1, 2, 5)) if (high - low) / size / s < most
    )
    first, last = math.ceil(low / size / step - 1e-9), math.floor(high / size / step + 1e-9)
    return [Tick(i * step * size, f"{i * step:.10g} {unit}" if i else "0") for i in range(first, last + 1)]


def _decades(low: float, high: float, units: Units, most: int) -> list[Tick]:
    """As many round values of each power of ten as there is room for, each in its own unit."""
    for mantissas in _MANTISSAS:
        found = [tick for tick in _round_values(units, mantissas) if low <= tick.value <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def _round_values(units: Units, mantissas: Sequence[int]) -> Iterator[Tick]:
    """From the smallest on; a unit's values end where the next larger unit begins."""
    ends = [math.inf, *(size for size, _ in units)]
    for (size, unit), end in reversed(list(zip(units, ends, strict=False))):
        powers = range(3) if end < math.inf else range(9)
        values = (m * 10**power * size for power in powers for m in mantissas)
        yield from (Tick(value, f"{value / size:.10g} {unit}") for value in values if value < end)
