"""A comparison's rows as points of memory against time, for the pictures of it in a terminal and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bptool.analysis.compare.result import CompareResult, CompareRow

_SAME_STEP = 1e-3  # of the tokens that a step handles: more is another step
_LIMIT_IN_VIEW = 1.5  # of the most memory: a limit far above would squeeze the picture
_PER = 1000  # tokens, where steps are not alike


@dataclass(frozen=True)
class Point:
    """A row that has figures.

    Attributes:
        row: its index; readers see one more.
        seconds: of what the time axis counts; `low` and `high` the tenth and ninetieth percentile, or the same.
        on_front, is_best: as the Result has it.
    """

    row: int
    n_bytes: int
    seconds: float
    low: float
    high: float
    on_front: bool
    is_best: bool

    @property
    def number(self) -> str:
        """As readers count."""
        return str(self.row + 1)


@dataclass(frozen=True)
class Plane:
    """What the picture shows.

    Attributes:
        memory, time: what the axes count.
        limit_bytes: what was asked to fit, where it lies in view.
        left_out: indices of rows that have no place.
    """

    points: Sequence[Point]
    memory: str
    time: str
    limit_bytes: int | None
    left_out: Sequence[int]

    @property
    def front(self) -> list[Point]:
        """Those on the front."""
        return [point for point in self.points if point.on_front]


def plane(result: CompareResult) -> Plane:
    """The rows that are `ok` and have both figures: measured ones, or predicted ones where nothing was run.

    A limit is asked of the predicted total, so that is what a prediction shows beside a limit. Where the rows' steps
    handle different numbers of tokens, time is that of so many tokens.
    """
    total = result.mode == "predict" and result.fit_bytes is not None
    shown = [i for i, row in enumerate(result.rows) if row.status == "ok" and _memory(result, row, total)]
    shown = [i for i in shown if _median(result, result.rows[i])]
    alike = _steps_are_alike([_units(result, result.rows[i]) for i in shown])
    points = [_point(result, i, total, alike) for i in shown]
    most = max((point.n_bytes for point in points), default=0)
    limit = result.fit_bytes if result.fit_bytes is not None and result.fit_bytes <= _LIMIT_IN_VIEW * most else None
    how = "predicted" if result.mode == "predict" else "measured"
    what = "memory needed" if total else "peak memory"
    time = "time of a step" if alike else f"time of {_PER:,} {result.unit}"
    left_out = [i for i in range(len(result.rows)) if i not in set(shown)]
    return Plane(points, f"{what}, {how}", f"{time}, {how}", limit, left_out)


def staircase(points: Sequence[Point]) -> list[Point]:
    """Those on the front by time, each with less memory than all before it: the front's edge in the picture.

    The others of the front are on it for their gradient error, which the picture does not show, or as good as tie.
    """
    found: list[Point] = []
    for point in sorted((p for p in points if p.on_front), key=lambda p: (p.seconds, p.n_bytes)):
        if not found or point.n_bytes < found[-1].n_bytes:
            found.append(point)
    return found


def edge(result: CompareResult) -> set[int]:
    """The rows of the front that no other row of it matches in both memory and time."""
    return {point.row for point in staircase(plane(result).points)}


def _memory(result: CompareResult, row: CompareRow, total: bool) -> int | None:
    if result.mode == "measure":
        return row.measured_peak_bytes
    return row.predicted_total_bytes if total else row.predicted_peak_bytes


def _median(result: CompareResult, row: CompareRow) -> float | None:
    if result.mode == "predict":
        return row.predicted_step_s
    return row.step_s.median if row.step_s else None


def _units(result: CompareResult, row: CompareRow) -> float | None:
    """What a step handles, such as tokens."""
    median = _median(result, row)
    return median * row.tokens_per_s if median and row.tokens_per_s else None


def _steps_are_alike(units: Sequence[float | None]) -> bool:
    """So they are taken to be, too, where one of them is not known."""
    known = [one for one in units if one is not None]
    return len(known) < len(units) or not known or max(known) <= (1 + _SAME_STEP) * min(known)


def _point(result: CompareResult, i: int, total: bool, alike: bool) -> Point:
    row = result.rows[i]
    n_bytes, median, units = _memory(result, row, total), _median(result, row), _units(result, row)
    assert n_bytes is not None
    assert median is not None
    each = 1.0 if alike or units is None else _PER / units
    low, high = (row.step_s.p10, row.step_s.p90) if result.mode == "measure" and row.step_s else (median, median)
    is_best = result.best is not None and result.best.row == i
    return Point(i, n_bytes, median * each, low * each, high * each, row.on_front, is_best)
