"""The terminal report of a comparison."""

from __future__ import annotations

import re

import pytest
from compare_records import MODE, POLICY, gradient, header, prediction, run
from comparisons import small_comparison

from bptool.analysis.compare.answers import compared
from bptool.analysis.compare.entries import Entry
from bptool.report.compare.console import render
from bptool.report.scatter import scatter

MIB = 2**20


def measured() -> list[Entry]:
    """Row 1 as fast as row 0 and bigger, row 2 slower and smaller, all in two rounds."""
    entries: list[Entry] = []
    for row, (peak, seconds) in enumerate([(80, (1.0, 1.0)), (90, (0.98, 1.01)), (40, (1.3, 1.31))]):
        entries.append(prediction(row, peak=(peak + row // 2) * MIB))
        entries.append(gradient(row, 10.0 ** (row - 7)))
        entries += [run(row, i, s, peak=peak * MIB, losses=(3.0, 2.0 + row / 10)) for i, s in enumerate(seconds)]
    return entries


def line(text: str, start: str) -> list[str]:
    """The cells of the first line that begins so."""
    (found,) = [one for one in text.splitlines() if one.strip().startswith(start)][:1]
    return re.split(r"\s{2,}", found.strip())


def test_the_answer_comes_first_and_a_command_last() -> None:
    text = render(compared(header(3), measured()), file="runs/my grid.jsonl")
    assert text.startswith("tiny training.steps=9 on a CPU: none is the fastest")
    assert "2 of 3 rows are on the front of memory, time and gradient error" in " ".join(text.split())
    assert text.splitlines()[-2:] == [
        "next:",
        "  bptool compare --from 'runs/my grid.jsonl' --fit 81MiB --html compare.html",  # and a reserve
    ]


def test_the_table_has_every_figure() -> None:
    text = render(compared(header(3), measured()), width=120)
    assert line(text, "settings") == [
        *("settings", "peak MiB", "predicted", "x", "step ms", "spread", "x", "tokens/s", "again", "front")
    ]
    assert line(text, "1 none") == [
        *("1 none", "80.00", "exact", "1.00", "1,000.00", "±1.0%", "1.00", "100", "25.0%", "front")
    ]
    assert line(text, "2 full")[3:] == ["1.12", "994.85", "±2.0%", "~0.99", "101", "25.0%", "by 1"]
    assert line(text, "3 save_matmuls")[2:4] == ["+2.50%", "0.50"]
    assert line(text, "3 save_matmuls")[-1] == "front"
    assert "~: no significant difference" in text


def test_gradients_and_losses_stand_in_a_table_of_their_own() -> None:
    text = render(compared(header(3), measured()))
    _, rest = text.split("gradients and loss")
    assert line(rest, "3 save_matmuls") == ["3 save_matmuls", "1.0e-05", "blocks.1", "2.0e-05", "3.0000", "2.2000"]
    assert "against float64's" in " ".join(text.split())


def test_rows_that_are_not_compared_say_why_once() -> None:
    entries: list[Entry] = [
        run(0),
        prediction(1, status="unsupported", reason="no such device"),
        prediction(2, status="unsupported", reason="no such device"),
    ]
    text = render(compared(header(3), entries))
    assert "1, 3" not in text
    assert line(text.split("not compared")[1], "2, 3") == ["2, 3", "unsupported: no such device"]


def test_a_note_of_several_rows_is_told_once() -> None:
    rows = [one.model_copy(update={"notes": ["no room", f"of {i}"]}) for i, one in enumerate(small_comparison().rows)]
    text = render(small_comparison({"rows": rows[:3], "best": None, "fit_bytes": None})).partition("of single rows")[2]
    assert line(text, "1, 2, 3") == ["1, 2, 3", "no room"]
    assert line(text, "2 ") == ["2", "of 1"]


@pytest.mark.parametrize("width", [60, 160])
def test_the_legend_is_of_the_columns_that_are_there(width: int) -> None:
    text = render(small_comparison(), width=width)
    (heading,) = [one for one in text.splitlines() if one.startswith("settings")]
    told = " ".join(text.split())
    assert (" again " in heading) == ("again: FLOPs of recomputation" in told) == (width == 160)


def test_a_gradient_that_is_not_finite_says_so() -> None:
    text = render(compared(header(1), [run(0), gradient(0, float("nan"))]))
    assert "not finite" in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_it_keeps_to_the_width(width: int) -> None:
    rows = [
        {POLICY: "save_every_other_matmul", MODE: mode, "training.micro_batch_size": 128}
        for mode in ("fp32", "bf16-mixed")
    ]
    axes = {POLICY: ["save_every_other_matmul"], MODE: ["fp32", "bf16-mixed"], "training.micro_batch_size": ["128"]}
    grid = header(2, rows=rows, axes=axes)
    entries: list[Entry] = [*measured()[:4], *measured()[4:8]]
    text = render(compared(grid, entries), width=width)
    body = text.partition("next:")[0]
    assert max(map(len, body.splitlines())) <= width


def test_a_prediction_says_that_it_is_one() -> None:
    grid = header(2, mode="predict", device="cuda", device_name="h100")
    text = render(compared(grid, [prediction(0, peak=80 * MIB), prediction(1, peak=40 * MIB, step_s=1.5)]), width=120)
    assert text.startswith("tiny training.steps=9 predicted for h100: ")
    assert line(text, "settings")[:5] == ["settings", "peak MiB", "x", "needs MiB", "step ms"]
    assert line(text, "2 full")[-4:] == ["1.50", "67", "25.0%", "front"]
    assert "gradient errors are not known before rows are run" in " ".join(text.split())


def test_numbers_of_two_digits_stand_below_each_other() -> None:
    rows = [{"optimizer.lr": i / 10} for i in range(10)]
    text = render(compared(header(10, rows=rows, axes={}), [run(i) for i in range(10)]))
    assert [one[:6] for one in text.splitlines() if "lr=0.8" in one or "lr=0.9" in one][:2] == ["   9 l", "  10 l"]


def test_one_row_on_the_front_is_one() -> None:
    text = render(compared(header(2), [run(0), run(1, status="failed", reason="x")]))
    assert "1 of 2 rows is on the front" in " ".join(text.split())


def test_a_grid_without_figures_is_told() -> None:
    text = render(compared(header(2), []))
    assert "no row has figures to compare" in text
    assert "not run" in text


def test_a_row_that_only_its_gradient_keeps_on_the_front_is_told_apart() -> None:
    """Larger and slower, and closer to float64: in the table, its legend, and the picture."""
    entries: list[Entry] = []
    for row, (peak, seconds, error) in enumerate([(40, 1.0, 1e-3), (80, 1.5, 1e-7), (30, 2.0, 1e-3)]):
        entries += [prediction(row, peak=peak * MIB), gradient(row, error)]
        entries += [run(row, i, seconds, peak=peak * MIB) for i in range(3)]
    result = compared(header(3), entries)
    text = render(result, width=120)
    assert [line(text, f"{n} ")[-1] for n in (1, 2, 3)] == ["front", "front*", "front"]
    assert "front*: another row of the front is as small and as fast" in " ".join(text.split())
    picture = scatter(result, width=90, colored=False)
    assert set(re.findall(r"[●◐]\d", picture)) == {"●1", "◐2", "●3"}
    assert "◐ on the front for its gradient error" in picture
    plain = render(compared(header(3), measured()), width=120)
    assert "front*" not in plain


def test_the_fastest_that_fits_is_the_best_though_another_is_as_fast_by_chance_and_smaller() -> None:
    entries: list[Entry] = []
    for row, (peak, seconds) in enumerate([(80, (1.0, 1.04, 1.02)), (40, (1.01, 1.03, 1.04))]):
        entries += [prediction(row, peak=peak * MIB), gradient(row, 1e-7)]
        entries += [run(row, i, s, peak=peak * MIB) for i, s in enumerate(seconds)]
    text = render(compared(header(2), entries, fit_bytes=100 * MIB), width=120)
    assert [line(text, f"{n} ")[-1] for n in (1, 2)] == ["best, by 2", "front"]
