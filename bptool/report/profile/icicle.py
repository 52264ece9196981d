"""Modules as an icicle in a terminal: what is inside a module hangs below it, as wide as its share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.text import Text

from bptool.report.profile.cost_tree import CostNode
from bptool.report.profile.work import WORK


class _Cell(NamedTuple):
    node: CostNode
    begin: float
    end: float
    """On the picture's width, in characters."""


def icicle(root: CostNode, *, width: int = 80, depth: int = 5, colored: bool = False) -> Text:
    """The picture, no line wider than `width`; each ends with a line break. Empty where nothing weighs anything.

    Two lines a level: names with shares of the whole, and bars that say what the time (or the FLOPs) is for.

    Args:
        depth: levels.
        colored: bars in colours, instead of a shade for each kind of work.
    """
    if not root.weight:
        return Text()
    root = root.shortened()
    level, lines = [_Cell(root, 0.0, float(width))], []
    for _ in range(depth):
        if not any(_columns(cell) for cell in level):
            break
        lines += [_names(level, root, width), _bars(level, colored)]
        level = [inside for cell in level for inside in _inside(cell)]
    lines += _legend(root, width, colored)
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines).append("\n")


def _inside(cell: _Cell) -> Iterator[_Cell]:
    """The parts of a module from its left end on, in order; what is its own stays free at the right end."""
    begin = cell.begin
    for child in cell.node.children:
        end = begin + child.weight / cell.node.weight * (cell.end - cell.begin) if cell.node.weight else begin
        yield _Cell(child, begin, end)
        begin = end


def _columns(cell: _Cell) -> int:
    return round(cell.end) - round(cell.begin)


def _names(level: Sequence[_Cell], root: CostNode, width: int) -> Text:
    """Each name where its module begins, as much of it as there is room for."""
    line = Text()
    for cell in level:
        room = _columns(cell)
        if room:
            line.append(" " * (round(cell.begin) - len(line)))
            line.append(_fitting(cell.node, cell.node.weight / root.weight, room).ljust(room)[:room])
    line.truncate(width)
    return line


def _fitting(node: CostNode, share: float, room: int) -> str:
    """The longest of a module's names that ends before the next one begins; none where it would say nothing."""
    whole = f"{node.name} {share:.0%}"
    for words in (whole, node.name):
        if len(words) < room:
            return words
    return node.name[: room - 2] + "…" if room > 4 else ""


def _bars(level: Sequence[_Cell], colored: bool) -> Text:
    line = Text()
    for cell in level:
        room = _columns(cell)
        if room:
            line.append(" " * (round(cell.begin) - len(line)))
            line.append_text(_split(cell.node, room, colored))
    return line


def _split(node: CostNode, room: int, colored: bool) -> Text:
    """A bar of so many characters by kinds of work; the last one stays free, so that neighbours are told apart."""
    amounts = node.seconds if node.timed else node.flops
    bar, done, total = Text(), 0.0, sum(amounts)
    for look, amount in zip(WORK, amounts, strict=True):
        done += amount
        n = round(done / total * max(room - 1, 1)) - len(bar) if total else 0
        bar.append(("█" if colored else look.shade) * n, look.color if colored else "")
    return bar


def _legend(root: CostNode, width: int, colored: bool) -> list[Text]:
    amounts = root.seconds if root.timed else root.flops
    lines = [Text()]
    for look, amount in zip(WORK, amounts, strict=True):
        if amount:
            key = ("█", look.color) if colored else (look.shade, "")
            entry = Text.assemble(key, f" {look.name} {amount / sum(amounts):.0%}   ")
            if len(lines[-1]) + len(entry) - 3 > width:
                lines.append(Text())
            lines[-1].append_text(entry)
    return lines
