"""A comparison as a page: the answer, memory against time, every row, what fills the memory, and what to run next."""

from __future__ import annotations

import json
import shlex
from math import isfinite
from xml.etree.ElementTree import Element

from bptool.analysis.compare.result import CompareResult
from bptool.report.axis import BYTE_UNITS, axis_around
from bptool.report.compare import page_rows as rows
from bptool.report.compare.points import Plane, Point, plane, staircase
from bptool.report.html.elements import element, styled
from bptool.report.html.page import page, section
from bptool.report.html.parts import Column, Tile, bullets, command_line, table, tiles
from bptool.report.html.scatter import Dot, ScatterPlot, scatter_plot
from bptool.report.html.sortable import sortable_table
from bptool.report.html.stacks import stacked_bars
from bptool.report.scale import SECOND_UNITS
from bptool.units import format_bytes, format_count, format_duration

_TICKS = 7


def render_page(result: CompareResult, *, command: str) -> str:
    """The page as one HTML document.

    Args:
        command: the command line that made it.
    """
    shown = plane(result)
    body = [
        _answer(result, shown),
        tiles(_tiles(result, shown)),
        *([section("What makes these figures doubtful", bullets(result.warnings))] if result.warnings else []),
        *([section("Memory against time", _lead(result, shown), _scatter(result, shown))] if shown.points else []),
        section("Every row", _introduction(result), _table(result)),
        *_categories(result),
        *_words("Why rows are left out", [(i, row.reason) for i, row in enumerate(result.rows) if row.reason], result),
        *_words("Notes", [(i, note) for i, row in enumerate(result.rows) for note in row.notes], result),
        *_next(result, shown),
        section("Again", command_line(command)),
    ]
    return page(result.command, " ".join([result.target, *result.overrides]), _circumstances(result), body)


def _circumstances(result: CompareResult) -> str:
    axes = " by ".join(f"{len(values)} of {key}" for key, values in result.axes.items())
    how = "predicted, nothing was run" if result.mode == "predict" else f"measured on {result.device_name}"
    if result.mode == "predict" and result.device_name:
        how = f"predicted for {result.device_name}, nothing was run"
    return " · ".join(word for word in (axes, how) if word)


def _answer(result: CompareResult, shown: Plane) -> Element:
    """The best row where one was asked for; else how many are worth a look."""
    kind, words = _verdict(result, shown)
    children = [styled("p", "verdict", words)]
    if result.interrupted:
        children.append(styled("p", "muted", "The grid was interrupted: the rows that are missing may change this."))
    return styled("div", f"answer {kind}", *children)


def _verdict(result: CompareResult, shown: Plane) -> tuple[str, str]:
    if result.best:
        row = result.rows[result.best.row]
        seconds = [format_duration(p.seconds) for p in shown.points if p.row == result.best.row]
        work = shown.time.rpartition(",")[0].removeprefix("time of ")
        time = f"{work} {'takes' if work.startswith('a ') else 'take'} {seconds[0]}, " if seconds else ""
        needs = f"{time}in {format_bytes(result.best.needed_bytes)}"
        limit = f" that fits {format_bytes(result.fit_bytes)}" if result.fit_bytes is not None else ""
        return "yes", f"{row.label} is the fastest{limit}: {needs}."
    if result.fit_bytes is not None:
        return "no", f"None of {len(result.rows)} rows fits {format_bytes(result.fit_bytes)}."
    front = shown.front
    if not front:
        return "no", f"None of {len(result.rows)} rows has figures to compare."
    verb = "is" if len(front) == 1 else "are"
    return "unknown", f"{_ends(result, shown)}; {len(front)} of {len(result.rows)} rows {verb} on the front."


def _ends(result: CompareResult, shown: Plane) -> str:
    fastest, least = min(shown.front, key=lambda p: p.seconds), min(shown.front, key=lambda p: p.n_bytes)
    first, second = _named(result, fastest.row), _named(result, least.row)
    first = first[:1].upper() + first[1:]
    if fastest is least:
        return f"{first}, is the fastest and takes the least memory"
    return f"{first}, is the fastest; {second}, takes the least memory"


def _tiles(result: CompareResult, shown: Plane) -> list[Tile]:
    """The ends of the front, and how much was done."""
    found = []
    if shown.front:
        fastest, least = min(shown.front, key=lambda p: p.seconds), min(shown.front, key=lambda p: p.n_bytes)
        found.append(Tile("fastest", format_duration(fastest.seconds), _named(result, fastest.row)))
        found.append(Tile("least memory", format_bytes(least.n_bytes), _named(result, least.row)))
    known = {p.row: result.rows[p.row].gradient_relative_error for p in shown.points}
    errors = {row: error for row, error in known.items() if error is not None and isfinite(error)}
    if errors:
        row = min(errors, key=lambda i: errors[i])
        found.append(Tile("least gradient error", rows.small(errors[row]), _named(result, row)))
    if result.rows:
        found.append(Tile("reference, 1.00", f"row {result.reference + 1}", result.rows[result.reference].label))
    processes = "1 process" if result.rounds == 1 else f"{result.rounds} processes"
    done = f"{processes} a row, timed steps of each: {result.steps}" if result.mode == "measure" else ""
    found.append(Tile("rows", format_count(len(result.rows)), done))
    return found


def _named(result: CompareResult, row: int) -> str:
    return f"row {row + 1}, {result.rows[row].label}"


def _lead(result: CompareResult, shown: Plane) -> Element:
    judged = any(result.rows[p.row].gradient_relative_error is not None for p in shown.points)
    words = (
        "Each point is a row, numbered as in the table below; lower and further left is better."
        " The line joins the front: rows that no other beats in"
        f" {'memory, time and gradient error' if judged else 'memory and time'} at once."
    )
    if any(p.low < p.high for p in shown.points):
        words += " Bars reach from the tenth to the ninetieth percentile of the time."
    if shown.left_out:
        words += f" Without figures: {', '.join(str(i + 1) for i in shown.left_out)}."
    return styled("p", "lead", words)


def _scatter(result: CompareResult, shown: Plane) -> Element:
    points = sorted(shown.points, key=lambda p: (not p.is_best, not p.on_front, p.row))
    corners = staircase(shown.points)
    front = sum(point.on_front for point in points)
    limit = shown.limit_bytes
    heights = [*(p.n_bytes for p in points), *([limit] if limit else [])]
    return scatter_plot(
        ScatterPlot(
            identity="scatter",
            description=f"{shown.memory}, against {shown.time}, of {len(points)} rows; the table below says the same.",
            dots=[_dot(result, point) for point in points],
            stairs=[(p.seconds, p.n_bytes) for p in corners],
            x=axis_around([seconds for p in points for seconds in (p.low, p.high)], SECOND_UNITS, _TICKS),
            y=axis_around(heights, BYTE_UNITS, _TICKS),
            x_label=shown.time,
            y_label=shown.memory,
            kinds=_kinds(points),
            remarks=["on the front but not joined: for its gradient error"] if front > len(corners) else [],
            limit=(limit, f"limit {format_bytes(limit)}") if limit else None,
            hint="Point at a row to see its settings and figures.",
        )
    )


def _kinds(points: list[Point]) -> list[tuple[str, str]]:
    names = {"is-best": "the fastest that fits", "is-front": "on the front", "is-other": "dominated"}
    there = {_kind(point) for point in points}
    return [(name, kind) for kind, name in names.items() if kind in there]


def _kind(point: Point) -> str:
    return "is-best" if point.is_best else "is-front" if point.on_front else "is-other"


def _dot(result: CompareResult, point: Point) -> Dot:
    detail = rows.detail(result, point.row)
    return Dot(point.number, detail, point.seconds, point.n_bytes, point.low, point.high, _kind(point))


def _introduction(result: CompareResult) -> Element:
    words = f"A click on a column's head puts the rows in its order. Ratios are to row {result.reference + 1}."
    if result.gradient_reference:
        words += f" Gradient errors are distances from the {result.gradient_reference} gradient over its norm."
    return styled("p", "lead", words)


def _table(result: CompareResult) -> Element:
    columns, cells = rows.every_row(result)
    return sortable_table(columns, cells, result.best.row if result.best else None)


def _categories(result: CompareResult) -> list[Element]:
    shown = rows.memory_by_category(result)
    if not shown.stacks:
        return []
    lead = styled("p", "lead", "What is held at the predicted peak of a step, row by row.")
    return [section("What fills the memory", lead, stacked_bars(shown))]


def _words(heading: str, said: list[tuple[int, str]], result: CompareResult) -> list[Element]:
    cells = [[str(i + 1), result.rows[i].label, rows.standing(result, i), words] for i, words in said]
    columns = [Column("row"), Column("settings"), Column("", "aside"), Column("", "words")]
    return [section(heading, table(columns, cells))] if cells else []


def _next(result: CompareResult, shown: Plane) -> list[Element]:
    """A run with the best row's settings; where none was asked for, with those of the fastest."""
    if result.best:
        return [section("Next", command_line(result.best.command))]
    if result.fit_bytes is not None or not shown.front:
        return []
    fastest = min(shown.front, key=lambda p: p.seconds).row
    lead = styled("p", "lead", f"Row {fastest + 1}, the fastest:")
    return [section("Next", element("div", None, lead, command_line(_train(result, fastest))))]


def _train(result: CompareResult, row: int) -> str:
    settings = [f"{key}={_value(value)}" for key, value in result.rows[row].settings.items() if value is not None]
    return shlex.join(["bptool", "train", result.target, *result.overrides, *settings])


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
