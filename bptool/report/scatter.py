"""A comparison as a scatter of memory against time in a terminal: points numbered as the rows are, the front joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from bptool.analysis.compare.result import CompareResult
from bptool.report.axis import BYTE_UNITS, Axis, axis_around
from bptool.report.compare.points import Plane, Point, plane, staircase
from bptool.report.scale import SECOND_UNITS
from bptool.units import format_bytes

_BEST, _FRONT, _OTHER = ("◆", "bold green"), ("●", "bold blue"), ("○", "bright_black")
_BESIDES = ("◐", "bold blue")
"""On the front, though not on its edge in the picture."""
_LIMIT, _STAIRS = ("╌", "red"), "blue"
_COLUMNS_A_TICK = 14


class _Place(NamedTuple):
    line: int
    column: int


class _Canvas:
    """Characters with styles, from the top left; what is drawn later lies above."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self._cells: dict[_Place, tuple[str, str]] = {}

    def draw(self, place: _Place, text: str, style: str) -> None:
        for i, character in enumerate(text):
            self._cells[_Place(place.line, place.column + i)] = (character, style)

    def line(self, line: int) -> Text:
        return Text.assemble(*(self._cells.get(_Place(line, column), " ") for column in range(self.columns)))


def scatter(result: CompareResult, *, width: int, height: int = 16, colored: bool) -> str:
    """The picture, no line wider than `width` (40 or more); each ends with a line break.

    Empty where no row has figures. Memory goes up and time to the right, so that the best rows are at the lower left.

    Args:
        height: lines of the plot itself.
        colored: with ANSI colours.
    """
    shown = plane(result)
    if not shown.points:
        return ""
    limits = [shown.limit_bytes] if shown.limit_bytes else []
    memory = axis_around([*(p.n_bytes for p in shown.points), *limits], BYTE_UNITS, max(3, height // 3))
    margin = max(len(tick.label) for tick in memory.ticks) + 2
    columns = width - margin - 1
    time = axis_around([p.seconds for p in shown.points], SECOND_UNITS, max(3, columns // _COLUMNS_A_TICK))
    canvas = _Canvas(columns, height)
    places = {p.row: _place(p, memory, time, canvas) for p in shown.points}
    _draw_limit(canvas, shown, memory)
    stairs = staircase(shown.points)
    _draw_stairs(canvas, [places[p.row] for p in stairs])
    looks = {p.row: _look(p, joined=not stairs or p in stairs) for p in shown.points}
    unnumbered = _draw_points(canvas, shown.points, places, looks)
    labels = {_down(tick.value, memory, height): tick.label for tick in memory.ticks}
    lines = [Text(shown.memory)]
    for line in range(height):
        axis = f"{labels[line]:>{margin - 1}} ┤" if line in labels else " " * margin + "│"
        lines.append(Text(axis).append_text(canvas.line(line)))
    lines += [Text(" " * margin + words) for words in _time_axis(time, columns)]
    lines.append(Text(shown.time.rjust(width)))
    lines += _legend(shown, unnumbered, width)
    for one in lines:
        one.rstrip()
    return _text(Text("\n").join(lines).append("\n"), colored)


def _text(picture: Text, colored: bool) -> str:
    if not colored:
        return picture.plain
    console = Console(force_terminal=True, color_system="standard", width=max(map(len, picture.split("\n"))) + 1)
    with console.capture() as capture:
        console.print(picture, end="", soft_wrap=True, highlight=False)
    return capture.get()


def _place(point: Point, memory: Axis, time: Axis, canvas: _Canvas) -> _Place:
    return _Place(_down(point.n_bytes, memory, canvas.lines), round(time.share(point.seconds) * (canvas.columns - 1)))


def _down(value: float, axis: Axis, lines: int) -> int:
    return round((1 - axis.share(value)) * (lines - 1))


def _draw_limit(canvas: _Canvas, shown: Plane, memory: Axis) -> None:
    if shown.limit_bytes is not None:
        mark, style = _LIMIT
        canvas.draw(_Place(_down(shown.limit_bytes, memory, canvas.lines), 0), mark * canvas.columns, style)


def _draw_stairs(canvas: _Canvas, places: Sequence[_Place]) -> None:
    """From each point to the right, as far as the next one, and then down to it."""
    for (line, column), (below, right) in pairwise(places):
        canvas.draw(_Place(line, column), "─" * (right - column), _STAIRS)
        canvas.draw(_Place(line, right), "┐" if below > line else "─", _STAIRS)
        for between in range(line + 1, below):
            canvas.draw(_Place(between, right), "│", _STAIRS)


def _draw_points(
    canvas: _Canvas, points: Sequence[Point], places: dict[int, _Place], looks: dict[int, tuple[str, str]]
) -> list[str]:
    """Marks and numbers, the most important above. Those that share a character share the numbers' place.

    Returns:
        numbers for which there was no room.
    """
    groups: dict[_Place, list[Point]] = {}
    for point in sorted(points, key=_rank):
        groups.setdefault(places[point.row], []).append(point)
    taken = set(groups)
    for place, group in groups.items():
        canvas.draw(place, *looks[group[0].row])
    unnumbered: list[str] = []
    for place, group in groups.items():
        numbers = ",".join(point.number for point in group)
        spot = next(
            (s for s in _beside(place, len(numbers)) if _is_free(s, len(numbers), taken - {place}, canvas)), None
        )
        if spot is None:
            unnumbered += [point.number for point in group]
            continue
        taken |= _covered(spot, len(numbers))
        canvas.draw(spot, numbers, looks[group[0].row][1])
    return sorted(unnumbered, key=int)


def _rank(point: Point) -> tuple[bool, bool, int]:
    return not point.is_best, not point.on_front, point.row


def _look(point: Point, *, joined: bool) -> tuple[str, str]:
    if point.is_best:
        return _BEST
    return _OTHER if not point.on_front else _FRONT if joined else _BESIDES


def _beside(place: _Place, length: int) -> Iterator[_Place]:
    """Where a point's numbers may stand: right, left, above, below."""
    line, column = place
    yield _Place(line, column + 1)
    yield _Place(line, column - length)
    for there in (line - 1, line + 1):
        for begin in (column, column + 1 - length):
            yield _Place(there, begin)


def _is_free(spot: _Place, length: int, taken: set[_Place], canvas: _Canvas) -> bool:
    """Within the plot, and no other mark or number there or at its ends, so that it is clear whose it is."""
    inside = 0 <= spot.line < canvas.lines and 0 <= spot.column <= canvas.columns - length
    return inside and not _covered(_Place(spot.line, spot.column - 1), length + 2) & taken


def _covered(spot: _Place, length: int) -> set[_Place]:
    return {_Place(spot.line, spot.column + i) for i in range(length)}


def _time_axis(time: Axis, columns: int) -> tuple[str, str]:
    """The axis with a mark at each tick, and the ticks' words below, as many as there is room for."""
    axis, words = ["─"] * columns, ""
    for tick in time.ticks:
        column = round(time.share(tick.value) * (columns - 1))
        begin = min(max(column - len(tick.label) // 2, 0), columns - len(tick.label))
        if not words or begin >= len(words) + 2:
            axis[column] = "┬"
            words = words.ljust(begin) + tick.label
    return "┼" + "".join(axis), " " + words


def _legend(shown: Plane, unnumbered: Sequence[str], width: int) -> list[Text]:
    joined = staircase(shown.points)
    front = [point for point in shown.points if point.on_front]
    entries = []
    if any(point.is_best for point in shown.points):
        entries.append(Text.assemble(_BEST, " the fastest that fits"))
    if any(not point.is_best for point in joined or front):
        entries.append(Text.assemble(_FRONT, " on the front"))
    if joined and any(point not in joined and not point.is_best for point in front):
        entries.append(Text.assemble(_BESIDES, " on the front for its gradient error"))
    if len(front) < len(shown.points):
        entries.append(Text.assemble(_OTHER, " dominated"))
    if shown.limit_bytes is not None:
        entries.append(Text.assemble((_LIMIT[0] * 2, _LIMIT[1]), f" limit {format_bytes(shown.limit_bytes)}"))
    entries += _numbers("no room for the numbers", unnumbered)
    entries += _numbers("without figures", [str(row + 1) for row in shown.left_out])
    lines = [Text()]
    for entry in entries:
        if len(lines[-1]) and len(lines[-1]) + len(entry) > width:
            lines.append(Text())
        lines[-1].append_text(entry).append("   ")
    return [part for line in lines for part in line.wrap(Console(width=width), width)]


def _numbers(words: str, numbers: Sequence[str]) -> list[Text]:
    return [Text(f"{words}: {', '.join(numbers)}")] if numbers else []
