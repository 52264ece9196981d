"""The terminal's picture: small ones worked by hand, and what holds of all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_estimates import small_timeline
from memory_traces import traces
from rich.cells import cell_len
from rich.text import Text

from bptool.analysis.memory.timeline import STACK, Point, Span, Timeline, timeline
from bptool.instruments.memory.trace import Category, MemoryTrace
from bptool.report.memory.categories import LOOKS
from bptool.report.memory.picture import picture
from bptool.units import KIB, format_bytes


def point(held: dict[Category, int]) -> Point:
    return Point(0, "", "", "", tuple(held.get(category, 0) for category in STACK), ())


def of_points(points: Sequence[Point], spans: Sequence[Span] = ()) -> Timeline:
    """Points of equal widths."""
    totals = [p.total_bytes for p in points]
    edges = tuple(i / len(points) for i in range(len(points) + 1))
    return Timeline(edges, tuple(points), tuple(spans), (), totals.index(max(totals)), {}, len(points))


BY_HAND = of_points(
    [
        point({"parameters": 2 * KIB}),
        point({"parameters": 2 * KIB, "activations": KIB}),
        point({"parameters": 2 * KIB, "activations": KIB, "temporaries": KIB}),
        point({"parameters": 2 * KIB, "gradients": KIB}),
    ],
    [Span("forward", 0, 0, 2), Span("backward", 0, 2, 4), Span("recompute", 1, 2, 3)],
)


def test_by_hand_without_colour() -> None:
    """An axis of 8 places leaves 32 columns, 8 for each point; 4 KiB on 4 lines. The mark is in a point's middle."""
    expected = [
        "                            ▼ 4.00 KiB",
        " 4 KiB ┤                ++++++++",
        "       │        ░░░░░░░░░░░░░░░░▒▒▒▒▒▒▒▒",
        " 2 KiB ┤████████████████████████████████",
        "       │████████████████████████████████",
        "     0 ┼┬───────────────┬═══════────────",
        "        forward         backward",
        "peak:   █ parameters 2.00 KiB",
        "        ▒ gradients 0 B",
        "        ░ activations 1.00 KiB",
        "        + temporaries 1.00 KiB",
        "        ═ recompute",
        "",
    ]
    assert picture(BY_HAND, width=40, height=4).plain.split("\n") == expected


def styles_of(drawn: Text, line: int) -> list[str]:
    """The style of each character of a line."""
    row = drawn.split("\n")[line]
    found = [""] * len(row.plain)
    for span in row.spans:
        found[span.start : span.end] = [str(span.style)] * (span.end - span.start)
    return found


def test_by_hand_in_colour() -> None:
    """4 KiB on 3 lines: the parameters end 4/8 into the second, the activations 2/8 into the third."""
    drawn = picture(BY_HAND, width=40, height=3, colored=True)
    blue, green, orange, pink = (
        LOOKS[category].color for category in ("parameters", "activations", "gradients", "temporaries")
    )
    lines = drawn.plain.split("\n")
    assert lines[1:4] == [
        " 4 KiB ┤        ▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂",
        " 2 KiB ┤" + "▄" * 32,  # at a line and a half, so on the second
        "       │" + "█" * 32,
    ]
    assert styles_of(drawn, 1)[16:] == [green] * 8 + [f"{green} on {pink}"] * 8 + [orange] * 8
    assert styles_of(drawn, 2)[8:] == [blue] * 8 + [f"{blue} on {green}"] * 16 + [f"{blue} on {orange}"] * 8
    assert styles_of(drawn, 3)[8:] == [blue] * 32


def test_a_cell_of_many_layers_shows_the_two_that_fill_most_of_it() -> None:
    """Of 16 eighths in all: 3 parameters, 1 inputs, 4 activations in the lower line. 3/(3+4) of 8 is 3.4."""
    held: dict[Category, int] = {"parameters": 300, "inputs": 100, "activations": 400, "temporaries": 800}
    drawn = picture(of_points([point(held)]), width=40, height=2, colored=True)
    assert set(drawn.plain.split("\n")[2][8:]) == {"▃"}
    both = f"{LOOKS['parameters'].color} on {LOOKS['activations'].color}"
    assert set(styles_of(drawn, 2)[8:]) == {both}


def test_the_marks_of_a_peak_at_the_right_edge() -> None:
    late = of_points([point({"inputs": 1}), point({"inputs": 1}), point({"inputs": 1}), point({"inputs": 2048})])
    first, second, *_ = picture(late, width=40, height=2).plain.split("\n")
    assert first.endswith("2.00 KiB ▼")
    assert second.index("=") <= first.index("▼") < len(second)


def test_names_that_would_collide_go_below_each_other() -> None:
    spans = [Span(name, 0, i, i + 1) for i, name in enumerate(["data", "forward", "backward", "clip", "optimizer"])]
    flat = of_points([point({"inputs": 8})] * 5, spans)
    lines = picture(flat, width=40, height=2).plain.split("\n")
    # An axis of 6 places leaves 34 columns; phases begin at 0, 6, 13, 20 and 27, and the last name ends at the edge.
    assert lines[4] == " " * 6 + "data  forward       clip optimizer"
    assert lines[5] == " " * 6 + " " * 13 + "backward"


def test_a_step_that_holds_nothing() -> None:
    assert "▼ 0 B" in picture(of_points([point({})]), width=40, height=3).plain


@given(trace=traces(), width=st.integers(40, 130), height=st.integers(2, 24), colored=st.booleans())
@settings(deadline=None, max_examples=60)
def test_it_keeps_to_its_size_and_shows_the_peak(trace: MemoryTrace, width: int, height: int, colored: bool) -> None:
    found = timeline(trace, 1)
    drawn = picture(found, width=width, height=height, colored=colored)
    lines = drawn.plain.split("\n")
    assert max(cell_len(line) for line in lines) <= width
    assert lines[-1] == ""
    assert all(line == line.rstrip() for line in lines)
    peak = found.points[found.peak].total_bytes
    assert format_bytes(peak) in lines[0]
    if peak:
        column = lines[0].index("▼")
        assert lines[1].ljust(width)[column] != " "  # the stack reaches the top just below the mark
    named = "\n".join(lines[height + 2 :])
    assert all(span.phase in named for span in found.spans if not span.depth)
    assert drawn.plain == picture(found, width=width, height=height, colored=colored).plain


def test_the_trainers_own_step_has_all_its_names() -> None:
    text = picture(small_timeline()).plain
    for name in ("data", "forward", "backward", "clip", "optimizer", "recompute", "parameters", "optimizer state"):
        assert name in text


def test_the_looks_are_the_stacks_and_the_pages() -> None:
    assert tuple(LOOKS) == STACK
    assert len({look.shade for look in LOOKS.values()}) == len(STACK)
    css = files("bptool.report.html").joinpath("style.css").read_text("utf-8")
    light = css[: css.index("@media")]
    for category, look in LOOKS.items():
        variable = re.search(rf"\.c-{category.replace('_', '-')} {{ --c: var\((--\w+)\)", css)
        assert variable
        assert f"{variable[1]}: {look.color};" in light


@pytest.mark.parametrize("colored", [False, True])
def test_no_control_characters(colored: bool) -> None:
    """Colour is in the styles, for `rich` to write or to leave out."""
    assert "\x1b" not in picture(BY_HAND, colored=colored).plain
