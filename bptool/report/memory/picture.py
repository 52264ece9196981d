"""A step's memory over time as a picture in a terminal: block characters in colour, shades without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from bptool.analysis.memory.timeline import STACK, Point, Span, Timeline
from bptool.report.axis import byte_ticks
from bptool.report.memory.categories import LOOKS
from bptool.units import format_bytes

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_EMPTY = len(STACK)  # a layer of its own, above all
_NAMES_ROWS = 3


def picture(timeline: Timeline, *, width: int = 80, height: int = 14, colored: bool = False) -> Text:
    """The picture, no line wider than `width` (40 or more) characters; each ends with a line break.

    Each column is the fullest instant of what it covers. Top to bottom: the peak's mark; `height` lines of the stack of
    categories against an axis in binary units; the phases; what the categories hold at the peak.

    Args:
        colored: eighths of blocks in colours, instead of a shade for each category.
    """
    top = max(point.total_bytes for point in timeline.points) or 1
    ticks = byte_ticks(top, max(2, height // 3))
    margin = max(len(tick.label) for tick in ticks) + 2
    columns = width - margin - 1
    labels = {max(0, round(tick.value / top * height) - 1): tick.label for tick in ticks[1:]}
    stacks = [_eighths(timeline.points[i], top, height) for i in _fullest(timeline, columns)]
    lines = [Text(" " * (margin + 1) + _peak_line(timeline, columns))]
    for row in reversed(range(height)):
        axis = f"{labels[row]:>{margin - 1}} ┤" if row in labels else " " * margin + "│"
        lines.append(Text(axis).append_text(_row(stacks, row, colored)))
    lines.append(Text(f"{'0':>{margin - 1}} ┼{_phase_line(timeline, columns)}"))
    lines += [Text(" " * (margin + 1) + names) for names in _names(timeline, columns)]
    lines += _legend(timeline, width, margin + 1, colored)
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines).append("\n")


def _place(share: float, columns: int) -> int:
    return min(int(share * columns), columns - 1)


def _fullest(timeline: Timeline, columns: int) -> list[int]:
    """For each column the fullest of the points that it covers, in part or in whole."""
    totals = [point.total_bytes for point in timeline.points]
    found = []
    first = 0
    for column in range(columns):
        while timeline.edges[first + 1] * columns <= column:
            first += 1
        last = first
        while last + 1 < len(totals) and timeline.edges[last + 1] * columns < column + 1:
            last += 1
        found.append(max(range(first, last + 1), key=lambda i: totals[i]))
    return found


def _eighths(point: Point, top: int, height: int) -> list[int]:
    """The heights at which the layers end, in eighths of a line, from the bottom to the top."""
    ends, held = [], 0
    for n_bytes in point.held_bytes:
        held += n_bytes
        ends.append(round(held / top * height * 8))
    return ends


def _row(stacks: Sequence[Sequence[int]], row: int, colored: bool) -> Text:
    line = Text()
    for ends in stacks:
        cell = _layers(ends, 8 * row)
        if colored:
            line.append(*_block(cell))
        else:
            layer = max(cell, key=lambda layer: (cell[layer], -layer))
            line.append(" " if layer == _EMPTY else LOOKS[STACK[layer]].shade)
    return line


def _layers(ends: Sequence[int], low: int) -> dict[int, int]:
    """How many of the eighths `low` to `low` + 8 each layer fills, from the bottom to the top."""
    found, begin = {}, low
    for layer, end in enumerate([*ends, low + 8]):
        if min(end, low + 8) > begin:
            found[layer] = min(end, low + 8) - begin
            begin = min(end, low + 8)
    return found


def _block(cell: dict[int, int]) -> tuple[str, str]:
    """A character and its style: the two layers that fill most of it, one as its colour and one as its ground."""
    lower, *rest = sorted(sorted(cell, key=lambda layer: -cell[layer])[:2])
    if lower == _EMPTY:
        return " ", ""
    color = LOOKS[STACK[lower]].color
    if not rest:
        return _EIGHTHS[8], color
    upper = rest[0]
    block = _EIGHTHS[min(7, max(1, round(8 * cell[lower] / (cell[lower] + cell[upper]))))]
    return block, color if upper == _EMPTY else f"{color} on {LOOKS[STACK[upper]].color}"


def _peak_line(timeline: Timeline, columns: int) -> str:
    """A mark above the peak, and how high it is."""
    place = _place((timeline.edges[timeline.peak] + timeline.edges[timeline.peak + 1]) / 2, columns)
    label = format_bytes(timeline.points[timeline.peak].total_bytes)
    if place + len(label) + 2 <= columns:
        return " " * place + f"▼ {label}"
    return f"{label} ▼".rjust(place + 1)


def _outer(timeline: Timeline) -> list[Span]:
    return [span for span in timeline.spans if span.depth == 0]


def _phase_line(timeline: Timeline, columns: int) -> str:
    """The axis: a mark where a phase begins, and double where something is done again."""
    line = ["─"] * columns
    for column, point in enumerate(_middles(timeline, columns)):
        if any(span.depth and span.begin <= point < span.end for span in timeline.spans):
            line[column] = "═"
    for span in _outer(timeline):
        line[_place(timeline.edges[span.begin], columns)] = "┬"
    return "".join(line)


def _middles(timeline: Timeline, columns: int) -> Iterator[int]:
    """The point in the middle of each column."""
    point = 0
    for column in range(columns):
        while timeline.edges[point + 1] * columns <= column + 0.5:
            point += 1
        yield point


def _names(timeline: Timeline, columns: int) -> list[str]:
    """The phases' names where each begins, on a further line where there is no room."""
    rows = [""] * _NAMES_ROWS
    for span in _outer(timeline):
        place = max(0, min(_place(timeline.edges[span.begin], columns), columns - len(span.phase)))
        for i, row in enumerate(rows):
            if not row or len(row) < place:
                rows[i] = row.ljust(place) + span.phase
                break
    return [row for row in rows if row]


def _legend(timeline: Timeline, width: int, indent: int, colored: bool) -> list[Text]:
    """What is held at the peak, the lowest layer first, and what the double line is."""
    held = timeline.points[timeline.peak].held_bytes
    entries = []
    for layer, category in enumerate(STACK):
        if any(point.held_bytes[layer] for point in timeline.points):
            look = LOOKS[category]
            key = ("█", look.color) if colored else (look.shade, "")
            entries.append(Text.assemble(key, f" {look.name} {format_bytes(held[layer])}"))
    entries += [Text(f"═ {phase}") for phase in dict.fromkeys(s.phase for s in timeline.spans if s.depth)]
    lines = [Text("peak:".ljust(indent))]
    for entry in entries:
        if len(lines[-1]) > indent and len(lines[-1]) + len(entry) > width:
            lines.append(Text(" " * indent))
        lines[-1].append_text(entry).append("   ")
    return lines
