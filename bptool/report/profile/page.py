"""A profile as a page: the answer, where the step goes, module by module and operation by operation, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal
from xml.etree.ElementTree import Element

from bptool.analysis.profile.result import OpCost, ProfileResult
from bptool.report.html.elements import element, styled
from bptool.report.html.icicle import Icicle, Slab, icicle
from bptool.report.html.page import page, section
from bptool.report.html.parts import (
    Column,
    Node,
    Piece,
    Tile,
    bar,
    bullets,
    command_line,
    meter,
    table,
    tiles,
    tree_table,
)
from bptool.report.html.roofline import Point, RooflinePlot, roofline
from bptool.report.profile import modules, sheets
from bptool.report.profile.console import asked, rows
from bptool.report.profile.cost_tree import CostNode, cost_tree
from bptool.report.profile.sheets import Sheet
from bptool.report.profile.work import WORK
from bptool.units import format_count, format_duration, format_flops, format_rate

_PHASES = {
    "data": "c-data",
    "forward": "c-forward",
    "recompute": "c-recompute",
    "backward": "c-dgrad",
    "clip": "c-clip",
    "optimizer": "c-update",
}
_EVERY_LEVEL = 99


def render_page(profile: ProfileResult, *, command: str) -> str:
    """The page as one HTML document.

    Args:
        command: the command line that made it.
    """
    body = [
        _answer(profile),
        tiles(_tiles(profile)),
        *([section("What makes these figures doubtful", bullets(profile.warnings))] if profile.warnings else []),
        _section(sheets.phases(profile), "One step, phase by phase"),
        section(
            "In words", table([Column(""), Column("", "words")], [[label, words] for label, words in rows(profile)])
        ),
        *_pictures(profile),
        *_roofline(profile),
        *(_section(sheet) for sheet in (sheets.ratio(profile), sheets.recompute(profile)) if sheet),
        section("Modules as a tree", _tree(profile)),
        *(
            _section(sheet, f"Every module, {sheet.title.split()[0]}")
            for sheet in modules.by_kind_of_work(profile, _EVERY_LEVEL)
        ),
        *_without_gradients(profile),
        _section(sheets.operations(profile, most=60), "Operation by operation"),
        *(_section(sheet) for sheet in [sheets.without_flops(profile)] if sheet),
        *([_section(sheets.unexplained(profile))] if profile.unexplained else []),
        *([_section(sheets.conventions(profile))] if profile.conventions else []),
        *([section("Assumptions", bullets(profile.assumptions))] if profile.assumptions else []),
        section("Again", command_line(command)),
    ]
    return page(profile.command, asked(profile), f"one training step on {profile.gpu or profile.device}", body)


def _answer(profile: ProfileResult) -> Element:
    """The ratio in words, and the step as a bar."""
    found = profile.flops_ratio
    in_flops = "has no FLOPs to compare" if found is None else f"is {found:.2f}x the forward in FLOPs"
    if profile.time:
        ratio = profile.time.backward_over_forward
        included = ", recomputation included," if profile.recomputes_in_backward else ""
        words = f"The backward{included} takes {ratio:.2f}x the forward's time, and {in_flops}."
    else:
        words = f"The backward {in_flops}. It was counted; no step was run."
    return styled("div", "answer", styled("p", "verdict", words), _step_bar(profile))


def _step_bar(profile: ProfileResult) -> Element:
    """Phases as long as they take, or, where nothing was timed, as they are predicted to; else by their FLOPs."""
    say: Callable[[float], str] = format_duration
    if profile.time:
        known = {phase: profile.time.of(phase) for phase in _PHASES}
        amounts = {phase: duration.median_s for phase, duration in known.items() if duration}
    elif profile.predicted:
        amounts = {one.phase: one.predicted_s for one in profile.predicted.phases if one.phase in _PHASES}
    else:
        amounts = {one.phase: float(one.flops) for one in profile.phases if one.phase in _PHASES and one.flops}
        say = format_flops
    whole = sum(amounts.values()) or 1.0
    pieces = [
        Piece(f"{phase} {say(amount)}, {amount / whole:.0%}", amount / whole, _PHASES[phase])
        for phase, amount in amounts.items()
    ]
    return meter(pieces, None, "")


def _tiles(profile: ProfileResult) -> list[Tile]:
    found = []
    time, flops, predicted = profile.time, profile.flops_ratio, profile.predicted
    if time:
        interval = f"95% from {time.backward_over_forward_low:.2f} to {time.backward_over_forward_high:.2f}"
        found.append(Tile("backward / forward, time", f"{time.backward_over_forward:.2f}", interval))
    if flops is not None:
        found.append(Tile("backward / forward, FLOPs", f"{flops:.3f}", "counted exactly"))
    if time and profile.tokens_per_s is not None:
        step = f"{format_duration(time.step.median_s)} a step"
        found.append(Tile(f"{profile.unit}/s", format_count(profile.tokens_per_s), step))
    if predicted:
        rate = f"{format_count(predicted.units_per_s)} {profile.unit}/s"
        found.append(Tile("predicted step", format_duration(predicted.step_s), rate))
    if profile.mfu is not None and profile.peak_flops_per_s is not None:
        peak = f"of {format_rate(profile.peak_flops_per_s, 'FLOP')}"
        found.append(Tile("MFU", f"{profile.mfu:.1%}", peak))
    if profile.hfu is not None:
        found.append(Tile("HFU", f"{profile.hfu:.1%}", "all FLOPs that are done"))
    found.append(Tile("parameters", format_count(profile.parameters_count)))
    if profile.finite_differences:
        one = profile.finite_differences
        note = f"by finite differences; backpropagation took {format_duration(one.gradients_s)}"
        found.append(Tile("all gradients", format_duration(one.finite_differences_s), note))
    return found


def _section(sheet: Sheet, heading: str = "") -> Element:
    """A table of the terminal's under its own heading."""
    columns = [
        Column(name, _kind(sheet, i)) for i, name in enumerate([sheet.title if heading else "", *sheet.headings[1:]])
    ]
    shown = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in sheet.rows)]
    cells = [[_indented(row[0]), *(row[i] for i in shown[1:])] for row in sheet.rows]
    title = heading or sheet.title[:1].upper() + sheet.title[1:]
    return section(title, table([columns[i] for i in shown], cells, sheet.emphasized))


def _kind(sheet: Sheet, column: int) -> Literal["text", "number", "aside", "aside number", "words"]:
    if sheet.words and column == len(sheet.headings) - 1:
        return "words"
    if any(column in group for group in sheet.leave_out[:2]):
        return "aside number" if column in sheet.right else "aside"
    return "number" if column in sheet.right else "text"


def _indented(name: str) -> str:
    """Blanks at the beginning stay blanks on a page."""
    return "\u2003" * ((len(name) - len(name.lstrip(" "))) // 2) + name.lstrip(" ")


def _pictures(profile: ProfileResult) -> list[Element]:
    """The modules by time, where there is any, and by FLOPs."""
    root = cost_tree(profile.modules).shortened()
    lead = styled(
        "p",
        "lead",
        "Each module hangs below the one that it is in, as wide as its share. Point at one to see what it costs;"
        " a click, or the arrow keys and Enter, widens it.",
    )
    found = []
    if root.timed and root.weight:
        found.append(section("Where the time goes", lead, _picture(root, "by-time", "Time of operations")))
    if root.untimed().weight:
        again = [] if found else [lead]
        found.append(section("Where the FLOPs go", *again, _picture(root.untimed(), "by-flops", "FLOPs")))
    return found


def _picture(root: CostNode, identity: str, what: str) -> Element:
    """The tree by its own weights; kinds of work that no module does are not among its figures."""
    done = [i for i in range(len(WORK)) if root.flops[i] or root.seconds[i]]
    return icicle(
        Icicle(
            identity=identity,
            description=f"{what} of a training step, by module; the tables below say the same.",
            root=_slab(root, done),
            kinds=[(WORK[i].name, WORK[i].css) for i in done],
            headings=["FLOPs", *(["time"] if root.timed else [])],
        )
    )


def _slab(node: CostNode, done: Sequence[int]) -> Slab:
    words = [node.path, node.type, _calls(node), _parameters(node)]
    flops, seconds = ([amounts[i] for i in done] for amounts in (node.flops, node.seconds))
    figures = [[format_flops(n)] for n in (*flops, sum(flops))]
    if node.timed:
        each = (*seconds, sum(seconds))
        figures = [[*row, format_duration(one)] for row, one in zip(figures, each, strict=True)]
    return Slab(
        name=node.name,
        note=" · ".join(filter(None, words)),
        weight=node.weight,
        amounts=seconds if node.timed else flops,
        figures=figures,
        children=[_slab(child, done) for child in node.children],
    )


def _calls(node: CostNode) -> str:
    return f"{node.calls:,} call{'' if node.calls == 1 else 's'}" if node.calls else ""


def _parameters(node: CostNode) -> str:
    return f"{format_count(node.parameters_count)} parameters" if node.parameters_count else ""


def _roofline(profile: ProfileResult) -> list[Element]:
    """Operations that do arithmetic, below the device's roofs; none where these are not known."""
    roof = profile.roofline
    points = [point for op in profile.ops if (point := _point(op, profile))]
    if roof is None or not points:
        return []
    lead = (
        "Operations by how much arithmetic they do for each byte, and how fast they do it. Below the slanted roof"
        " memory is the limit, below the flat one arithmetic. An area is a share of the time; what does no arithmetic"
        " is not shown."
    )
    if profile.time:
        lead += " What is above the slanted one found its data in a cache."
    else:
        lead += " Nothing was timed: each stands where the roofs let it be."
    kinds = [(look.name, look.css) for look in WORK if any(op.kind == look.key for op in profile.ops)]
    plot = RooflinePlot(
        identity="roofline",
        description=f"{len(points)} operations below the roofs of {roof.device}.",
        points=points,
        flops_per_s=roof.flops_per_s,
        bytes_per_s=roof.bytes_per_s,
        roofs=[
            f"flat {format_rate(roof.flops_per_s, 'FLOP')}, {roof.flops_source}",
            f"slanted {format_rate(roof.bytes_per_s, 'B')}, {roof.bytes_source};"
            f" they meet at {roof.ridge:.1f} FLOPs a byte",
        ],
        kinds=[*kinds, ("update", "c-update")],
        x_label="FLOPs for each byte moved",
        format_x=lambda value: f"{value:g}",
        format_y=lambda value: format_rate(value, "FLOP").replace(".0 ", " "),
        hint="Point at an operation.",
    )
    return [section(f"The roofline of {roof.device}", styled("p", "lead", lead), roofline(plot))]


def _point(op: OpCost, profile: ProfileResult) -> Point | None:
    work, seconds = op.flops + op.pointwise_flops, op.duration_s if profile.time else op.predicted_s
    total = sum(sheets.op_weight(one) for one in profile.ops)
    if not work or not seconds or not op.intensity:
        return None
    detail = (
        f"{op.kind}, {op.calls:,}x, {format_flops(work)}, {op.intensity:.1f} FLOPs a byte,"
        f" {format_rate(work / seconds, 'FLOP')}, {format_duration(seconds)}"
    )
    css = {look.key: look.css for look in WORK}.get(op.kind, "c-update")
    return Point(op.op, detail, op.intensity, work / seconds, seconds / total, css)


def _tree(profile: ProfileResult) -> Element:
    root = cost_tree(profile.modules)
    columns = [Column("module"), Column("FLOPs", "number"), *([Column("time", "number")] if root.timed else [])]
    lead = "Each row holds what is inside it too. Layers that are alike share a row, and it holds them all."
    return element("div", None, styled("p", "lead", lead), tree_table(columns, _branch(root, root)))


def _branch(node: CostNode, root: CostNode) -> Node:
    def cell(amount: float, whole: float, words: str, kind: str) -> list[Element | str]:
        return [bar(amount / (whole or 1.0), kind), styled("span", "number", words)]

    flops, seconds = sum(node.flops), sum(node.seconds)
    cells = [cell(flops, sum(root.flops), format_flops(flops) if flops else "none", "c-forward")]
    if root.timed:
        cells.append(cell(seconds, sum(root.seconds), format_duration(seconds), "c-dgrad"))
    return Node(node.name, cells, [_branch(child, root) for child in node.children])


def _without_gradients(profile: ProfileResult) -> list[Element]:
    known = modules.without_gradients(profile)
    cells: Sequence[Sequence[Element | str]] = [[words, element("code", None, names)] for words, names in known]
    title = "Modules without all of their gradients"
    return [section(title, table([Column(""), Column("", "words")], cells))] if known else []
