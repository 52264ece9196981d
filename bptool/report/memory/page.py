"""A memory estimate as a page: the answer, the step's memory over time, and what would change it."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from bptool.analysis.memory.result import CategoryBytes, MemoryEstimate, WhatIf
from bptool.analysis.memory.timeline import STACK, Point, Timeline
from bptool.instruments.memory.trace import Category
from bptool.report.html.chart import (
    Band,
    Detail,
    Instant,
    Limit,
    Series,
    StackedArea,
    show_button,
    stacked_area,
)
from bptool.report.html.elements import element, styled
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
    swatch,
    table,
    tiles,
    tree_table,
)
from bptool.report.memory.categories import LOOKS
from bptool.report.module_tree import ModuleNode, module_tree
from bptool.report.text import place
from bptool.units import format_bytes, format_count

_LIMIT_IN_VIEW = 1.5  # of the peak: a capacity far above it would squeeze the picture


def render_page(estimate: MemoryEstimate, timeline: Timeline, *, target: str, command: str) -> str:
    """The page as one HTML document.

    Args:
        timeline: of the step that the estimate is about.
        target: what was estimated, in the user's words.
        command: the command line that made it.
    """
    chart = _chart(estimate, timeline)
    body = [
        _answer(estimate),
        tiles(_tiles(estimate)),
        section("One step", _introduction(estimate), stacked_area(chart)),
        section("What fills it", _categories(estimate)),
        section("The fullest instant of each phase", _phases(estimate, timeline, chart)),
        *([section("What would change it", _what_if(estimate))] if estimate.what_if else []),
        *([section("Module by module", _modules(estimate))] if estimate.modules else []),
        *([section("Assumptions", bullets(estimate.assumptions))] if estimate.assumptions else []),
        section("Again", command_line(command)),
    ]
    return page(estimate.command, target, f"one training step on {estimate.gpu or estimate.device}", body)


def _answer(estimate: MemoryEstimate) -> Element:
    """Whether it fits, and the bar that shows it."""
    needed = estimate.peak_reserved_bytes + estimate.overhead_bytes
    need, capacity = format_bytes(needed), estimate.capacity_bytes
    if capacity is None:
        words, kind = f"It needs {need}.", "unknown"
    elif estimate.fits:
        words, kind = f"It fits: {need} of {format_bytes(capacity)}.", "yes"
    else:
        words, kind = f"It does not fit: it needs {need}, and there are {format_bytes(capacity)}.", "no"
    return styled("div", f"answer {kind}", styled("p", "verdict", words), _meter(estimate))


def _meter(estimate: MemoryEstimate) -> Element:
    amounts = [
        (LOOKS[category].name, n_bytes, _kind(category)) for category, n_bytes in _held(estimate.at_peak).items()
    ]
    amounts.append(
        ("reserved, not allocated", estimate.peak_reserved_bytes - estimate.peak_allocated_bytes, "c-reserved")
    )
    amounts.append(("outside PyTorch's allocator", estimate.overhead_bytes, "c-overhead"))
    pieces = [Piece(f"{name} {format_bytes(n_bytes)}", n_bytes, kind) for name, n_bytes, kind in amounts if n_bytes > 0]
    capacity = estimate.capacity_bytes
    return meter(pieces, capacity, "" if capacity is None else f"capacity {format_bytes(capacity)}")


def _held(held: CategoryBytes) -> dict[Category, int]:
    """By category, in the picture's order."""
    return {category: getattr(held, f"{category}_bytes") for category in STACK}


def _tiles(estimate: MemoryEstimate) -> list[Tile]:
    where = " in ".join(word for word in (estimate.peak_phase, estimate.peak_module) if word)
    found = [
        Tile("peak allocated", format_bytes(estimate.peak_allocated_bytes), where),
        Tile("peak reserved", format_bytes(estimate.peak_reserved_bytes), "with the allocator's gaps"),
        Tile("parameters", format_count(estimate.parameters_count), _trained(estimate)),
    ]
    if estimate.capacity_bytes is not None:
        left = estimate.capacity_bytes - estimate.peak_reserved_bytes - estimate.overhead_bytes
        label = "left over" if left >= 0 else "missing"
        found.append(Tile(label, format_bytes(abs(left)), f"of {format_bytes(estimate.capacity_bytes)}"))
    if estimate.measured is not None:
        error = estimate.measured.relative_error
        note = "equal to the byte" if error == 0 else f"the estimate is off by {error:+.2%}"
        found.append(Tile("measured peak", format_bytes(estimate.measured.peak_allocated_bytes), note))
    return found


def _trained(estimate: MemoryEstimate) -> str:
    if estimate.trainable_parameters_count == estimate.parameters_count:
        return "all of them trained"
    return f"{format_count(estimate.trainable_parameters_count)} of them trained"


def _introduction(estimate: MemoryEstimate) -> Element:
    words = (
        "Everything that a step holds, from its batch to its update."
        " Point at an instant to see what is held and why; a click keeps it, and the arrow keys walk."
    )
    if estimate.extrapolated_from_layers:
        *layers, last = map(str, estimate.extrapolated_from_layers)
        words += f" It is extended from models of {', '.join(layers)} and {last} layers."
    return styled("p", "lead", words)


def _kind(category: Category) -> str:
    return "c-" + category.replace("_", "-")


def _chart(estimate: MemoryEstimate, timeline: Timeline) -> StackedArea:
    peak = timeline.points[timeline.peak]
    capacity = estimate.capacity_bytes
    near = capacity is not None and capacity <= _LIMIT_IN_VIEW * peak.total_bytes
    return StackedArea(
        identity="timeline",
        description=f"Memory held during a training step, by category. The peak is {format_bytes(peak.total_bytes)},"
        f" at {place(peak.phase, peak.op, peak.module)}.",
        edges=timeline.edges,
        series=[
            Series(LOOKS[category].name, _kind(category), [point.held_bytes[i] for point in timeline.points])
            for i, category in enumerate(STACK)
        ],
        instants=[_instant(point, timeline) for point in timeline.points],
        bands=[Band(span.phase, span.begin, span.end, span.depth) for span in timeline.spans],
        shown=timeline.peak,
        details_heading="the largest, of what this step made",
        axis_label=f"allocations and releases in order, {timeline.n_events:,} events; not to the scale of time",
        limit=Limit(capacity, f"capacity {format_bytes(capacity)}") if capacity is not None and near else None,
    )


def _instant(point: Point, timeline: Timeline) -> Instant:
    details = []
    for share in point.largest:
        kind = timeline.kinds[share.kind]
        where = place("", kind.op, kind.module)
        details.append(Detail(kind.tensor, where, _kind(kind.category), share.count, share.n_bytes))
    return Instant(place(point.phase or "after the step", point.op, point.module), details)


def _categories(estimate: MemoryEstimate) -> Element:
    at_peak, maximum = _held(estimate.at_peak), _held(estimate.maximum)
    rows: list[list[Element | str]] = []
    for category, look in LOOKS.items():
        share = at_peak[category] / max(estimate.peak_allocated_bytes, 1)
        rows.append(
            [
                element("span", None, swatch(_kind(category)), look.name),
                styled("span", "muted", look.meaning),
                bar(share, _kind(category)),
                format_bytes(at_peak[category]),
                f"{share:.1%}",
                format_bytes(maximum[category]),
            ]
        )
    headings = [Column("category"), Column("what it is", "aside"), Column("", "aside"), Column("at the peak", "number")]
    return table([*headings, Column("", "aside number"), Column("its own maximum", "number")], rows)


def _phases(estimate: MemoryEstimate, timeline: Timeline, chart: StackedArea) -> Element:
    rows: list[list[Element | str]] = []
    for peak in estimate.phase_peaks:
        instant = timeline.phase_peaks.get(peak.phase)
        share = peak.peak_allocated_bytes / max(estimate.peak_allocated_bytes, 1)
        rows.append(
            [
                peak.phase if instant is None else show_button(chart, instant, peak.phase),
                bar(share),
                format_bytes(peak.peak_allocated_bytes),
                f"{share:.1%}",
                element("code", None, place("", peak.op, peak.module) or "as it begins"),
            ]
        )
    emphasized = next((i for i, peak in enumerate(estimate.phase_peaks) if peak.phase == estimate.peak_phase), None)
    columns = [
        Column("phase"),
        Column("", "aside"),
        Column("peak", "number"),
        Column("of the step's", "aside number"),
        Column("where"),
    ]
    return table(columns, rows, emphasized)


def _what_if(estimate: MemoryEstimate) -> Element:
    changes = sorted(estimate.what_if, key=lambda change: change.peak_allocated_bytes)
    rows = [_change_row(change, estimate.peak_allocated_bytes) for change in changes]
    return table(
        [
            Column("with"),
            Column("", "aside"),
            Column("peak", "number"),
            Column("saves", "number"),
            Column("", "aside number"),
        ],
        rows,
    )


def _change_row(change: WhatIf, peak: int) -> list[Element | str]:
    saving = peak - change.peak_allocated_bytes
    share = saving / max(peak, 1)
    return [
        element("code", None, " ".join(change.settings)),
        bar(change.peak_allocated_bytes / max(peak, 1)),
        format_bytes(change.peak_allocated_bytes),
        format_bytes(saving),
        f"{share:.1%}",
    ]


def _modules(estimate: MemoryEstimate) -> Element:
    root = module_tree(estimate.modules)
    columns = [Column("module"), Column("parameters", "number"), Column("activations as the forward ends", "number")]
    lead = "Each row holds what is inside it too. Layers that are alike share a row, and it holds them all."
    return element("div", None, styled("p", "lead", lead), tree_table(columns, _node(root, root)))


def _node(module: ModuleNode, root: ModuleNode, around: int = 1) -> Node:
    """A row and those below it; `around`: how many are alike of what it lies in."""

    def cell(n_bytes: int, whole: int, kind: str) -> list[Element | str]:
        return [bar(n_bytes / max(whole, 1), kind), styled("span", "number", format_bytes(n_bytes))]

    return Node(
        module.name if module.count == around else f"{module.name} ({module.count} alike)",
        [
            cell(module.parameters_bytes, root.parameters_bytes, "c-parameters"),
            cell(module.activations_bytes, root.activations_bytes, "c-activations"),
        ],
        [_node(child, root, module.count) for child in module.children.values()],
    )
