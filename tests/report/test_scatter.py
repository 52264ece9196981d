"""The scatter in a terminal: marks where the axes say, numbers that can be told apart."""

from __future__ import annotations

import re

import pytest
from comparisons import (
    comparison,
    large_comparison,
    measured_row,
    mixed_comparison,
    predicted_comparison,
    small_comparison,
)
from rich.cells import cell_len
from rich.text import Text

from bptool.analysis.compare.result import CompareResult
from bptool.report.scatter import scatter
from bptool.units import MIB

RESULTS = {
    "small": small_comparison(),
    "large": large_comparison(),
    "72 rows": large_comparison(3),
    "failures": mixed_comparison(),
    "predicted": predicted_comparison(),
    "one": comparison([measured_row("none", "fp32")]),
}


def drawn(result: CompareResult, width: int = 100, height: int = 16) -> list[str]:
    return scatter(result, width=width, height=height, colored=False).split("\n")


def plot(lines: list[str], height: int = 16) -> list[str]:
    """The plot itself, without its axes."""
    return [re.split("[┤│]", line, maxsplit=1)[1] for line in lines[1 : height + 1]]


def test_by_hand() -> None:
    """Two rows on the front, on 9 lines of 41 columns; 8% of the axes are free at each end.

    400 MiB lies 108/116 up of 8 lines, 1 s lies 8/116 across 40 columns.
    """
    rows = [
        measured_row("none", "fp32").model_copy(update={"measured_peak_bytes": n * MIB, "step_s": None})
        for n in (400, 300)
    ]
    step = measured_row("none", "fp32").step_s
    assert step is not None
    timed = [
        row.model_copy(update={"step_s": step.model_copy(update={"median": s}), "tokens_per_s": 512 / s})
        for row, s in zip(rows, (1.0, 2.0), strict=True)
    ]
    assert drawn(comparison(timed), width=51, height=9) == [
        "peak memory, measured",
        "         │",
        " 400 MiB ┤   ●1" + 32 * "─" + "┐",
        *(2 * ["         │" + 37 * " " + "│"]),
        " 350 MiB ┤" + 37 * " " + "│",
        *(2 * ["         │" + 37 * " " + "│"]),
        " 300 MiB ┤" + 37 * " " + "●2",
        "         │",
        "         ┼───┬────────────────┬────────────────┬───",
        "            1 s             1.5 s             2 s",
        "                           time of a step, measured",
        "● on the front",
        "",
    ]


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("width", [40, 57, 80, 200])
def test_it_keeps_to_its_width_and_height(name: str, width: int) -> None:
    for height in (6, 16, 30):
        lines = drawn(RESULTS[name], width, height)
        assert max(map(cell_len, lines)) <= width
        assert len(plot(lines, height)) == height
        assert lines[-1] == ""


@pytest.mark.parametrize("name", RESULTS)
def test_every_point_is_marked_and_numbered_once(name: str) -> None:
    result = RESULTS[name]
    lines = drawn(result)
    words = "\n".join(lines)
    inside = "\n".join(plot(lines))
    numbers = re.findall(r"\d+", inside)
    crowded = re.search(r"no room for the numbers: ([\d, \n]+)", words)
    numbers += re.findall(r"\d+", crowded[1]) if crowded else []
    assert sorted(map(int, numbers)) == [i + 1 for i, row in enumerate(result.rows) if row.status == "ok"]
    assert inside.count("◆") == (result.best is not None)


def test_a_number_stands_beside_its_own_mark() -> None:
    """Each is next to the mark that stands where its row's figures are, to the nearest character."""
    result = small_comparison()
    lines = plot(drawn(result))
    marks = [(y, x) for y, line in enumerate(lines) for x, sign in enumerate(line) if sign in "●◐◆○"]
    by_memory = sorted(range(6), key=lambda i: -(result.rows[i].measured_peak_bytes or 0))
    assert [i + 1 for i in by_memory] == [1, 2, 5, 6, 3, 4]
    assert [int(re.findall(r"\d+", lines[y][x : x + 2])[0]) for y, x in marks] == [1, 2, 5, 6, 3, 4]
    across = {int(lines[y][x + 1]): x for y, x in marks}
    times = {i + 1: row.step_s.median for i, row in enumerate(result.rows) if row.step_s}
    assert sorted(across, key=lambda n: across[n]) == sorted(times, key=lambda n: times[n])
    scale = (across[3] - across[2]) / (times[3] - times[2])
    assert across == {n: pytest.approx(across[2] + scale * (times[n] - times[2]), abs=1) for n in times}


def test_rows_in_one_place_share_a_number() -> None:
    rows = [measured_row("none", "fp32")] * 3
    assert "1,2,3" in "\n".join(drawn(comparison(rows)))


def test_the_legend_says_what_is_there() -> None:
    legend = "\n".join(drawn(small_comparison())[-4:])
    assert "◆ the fastest that fits   ● on the front" in legend
    assert "╌╌ limit 270.00 MiB" in legend
    assert "dominated" not in legend
    assert "○ dominated" in "\n".join(drawn(mixed_comparison()))
    assert "without figures: 5, 6, 7, 8, 9, 10, 11" in "\n".join(drawn(mixed_comparison()))


def test_a_limit_in_view_is_a_line() -> None:
    lines = plot(drawn(small_comparison()))
    (line,) = [y for y, text in enumerate(lines) if text.count("╌") > 40]
    heights = {n: y for y, text in enumerate(lines) for n in re.findall(r"[●◐◆](\d)", text)}
    assert heights["5"] < line <= heights["6"]


def test_colours_say_the_same_as_signs() -> None:
    for result in RESULTS.values():
        colored = scatter(result, width=90, colored=True)
        assert Text.from_ansi(colored).plain.rstrip("\n") == scatter(result, width=90, colored=False).rstrip("\n")
    assert "\x1b[1;32m◆" in scatter(small_comparison(), width=90, colored=True)
    assert "\x1b" not in scatter(small_comparison(), width=90, colored=False)


def test_nothing_to_draw() -> None:
    rows = [row for row in mixed_comparison().rows if row.status != "ok"]
    assert scatter(comparison(rows), width=80, colored=False) == ""
