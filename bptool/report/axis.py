"""Round places on an axis of bytes, for pictures on a page and in a terminal."""

from __future__ import annotations

from typing import NamedTuple

from bptool.units import GIB, KIB, MIB, TIB

_UNITS = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
_STEPS = [m * 10**power for power in range(-1, 9) for m in (1, 2, 5)]


class Tick(NamedTuple):
    """A place on the axis, in bytes, and what it says."""

    n_bytes: float
    label: str


def byte_ticks(top: float, most: int) -> list[Tick]:
    """Ticks from 0 to at most `top` bytes, besides the 0 `most` (2 or more) of them or fewer, all in one binary unit.

    They are multiples of 1, 2 or 5 times a power of ten of the unit: `0`, `0.5 GiB`, `1 GiB`.
    """
    size, unit = next(((size, unit) for size, unit in _UNITS if top >= size), (1, "B"))
    steps = [step for step in _STEPS if size > 1 or step >= 1]
    step = next(step for step in steps if top / size / step < most + 1)
    values = [i * step for i in range(1, int(top / size / step) + 1)]
    return [Tick(0.0, "0"), *(Tick(value * size, f"{value:.10g} {unit}") for value in values)]
