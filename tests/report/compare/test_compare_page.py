"""The page of a comparison, as text: its answer, its figures, its words, and that it stands alone."""

from __future__ import annotations

import shlex

import pytest
from comparisons import (
    FAILURES,
    HOSTILE,
    comparison,
    failed_row,
    hostile_comparison,
    large_comparison,
    measured_row,
    mixed_comparison,
    predicted_comparison,
    small_comparison,
)
from web_page import WebPage, assert_stands_alone

from bptool.analysis.compare.result import Best, CompareResult, Ratio
from bptool.report.compare.page import render_page
from bptool.units import MIB, format_bytes, format_duration

ONE = comparison([measured_row("none", "fp32")])
RESULTS = {
    "small": small_comparison(),
    "72 rows": large_comparison(3),
    "failures": mixed_comparison(),
    "failures alone": comparison([failed_row(status) for status in FAILURES]),
    "predicted": predicted_comparison(),
    "one": ONE,
    "none": comparison([]),
    "hostile": hostile_comparison(),
}


def rendered(result: CompareResult) -> str:
    return render_page(result, command="bptool compare --from grid.jsonl")


def words(result: CompareResult) -> list[str]:
    return WebPage(rendered(result)).words


def verdict(result: CompareResult) -> str:
    said = words(result)
    return next(said[i] for i in range(len(said)) if i > 4 and said[i].endswith("."))


@pytest.mark.parametrize("name", RESULTS)
def test_it_stands_alone_and_is_small(name: str) -> None:
    text = rendered(RESULTS[name])
    assert_stands_alone(text) if name != "hostile" else WebPage(text)
    assert len(text) < 2**19


def test_the_answer_is_the_best_row() -> None:
    said = verdict(small_comparison())
    assert said == "selective · bf16-mixed is the fastest that fits 270.00 MiB: a step takes 92.02 ms, in 264.53 MiB."


def test_the_answer_where_none_was_asked_for_or_none_fits() -> None:
    asked = {"fit_bytes": None, "best": None}
    assert verdict(small_comparison(asked)) == (
        "Row 2, none · bf16-mixed, is the fastest; row 4, full · bf16-mixed, takes the least memory;"
        " 6 of 6 rows are on the front."
    )
    assert verdict(ONE) == "Row 1, none · fp32, is the fastest and takes the least memory; 1 of 1 rows is on the front."
    assert verdict(small_comparison({"fit_bytes": MIB, "best": None})) == "None of 6 rows fits 1.00 MiB."
    assert verdict(RESULTS["failures alone"]) == "None of 7 rows has figures to compare."


def test_the_best_of_unlike_steps_is_told_by_the_token() -> None:
    """120 ms for 512 tokens, and 4**0.9 as long for four times as many."""
    rows = [measured_row("none", "fp32"), measured_row("none", "fp32", 4)]
    best = Best(row=1, settings=rows[1].settings, command="bptool train", needed_bytes=MIB)
    seconds = 0.120 * 4**0.9 * 1000 / 2048
    said = verdict(comparison(rows, {"fit_bytes": 2 * MIB, "best": best}))
    assert said.endswith(f"fits 2.00 MiB: 1,000 tokens take {format_duration(seconds)}, in 1.00 MiB.")


def test_no_prediction_stands_among_measured_times() -> None:
    bad = failed_row("failed").model_copy(update={"predicted_step_s": 0.0625})
    page = rendered(comparison([measured_row("none", "fp32"), bad]))
    assert format_duration(0.0625) not in page
    assert format_duration(0.0625) in rendered(predicted_comparison({"rows": [bad]}))


def test_one_process_is_one() -> None:
    assert "1 process a row" in rendered(small_comparison({"rounds": 1}))


def test_every_figure_is_there() -> None:
    result = small_comparison()
    said = words(result)
    for row in result.rows:
        assert row.step_s is not None
        assert row.measured_peak_bytes is not None
        assert row.predicted_peak_bytes is not None
        assert row.recompute_flops_share is not None
        for figure in [
            *(format_bytes(row.measured_peak_bytes), format_bytes(row.predicted_peak_bytes)),
            *(format_duration(row.step_s.median), f"{row.peak_ratio:.2f}×", f"{row.recompute_flops_share:.1%}"),
            *(f"{row.final_loss:.4f}", f"{row.gradient_relative_error:.1e}", row.label),
        ]:
            assert figure in said, figure
    assert "5.3e-07 in blocks.\u200b3.\u200battention" in said  # which may break behind a dot


def test_a_difference_within_the_spread_is_not_told_as_one() -> None:
    row = measured_row("full", "fp32")
    for ratio, told in [
        (Ratio(value=1.02, low=0.98, high=1.06, significant=False), "1.02×, no significant difference"),
        (Ratio(value=1.31, low=None, high=None, significant=True), "1.31×"),
    ]:
        changed = row.model_copy(update={"time_ratio": ratio})
        said = words(comparison([measured_row("none", "fp32"), changed]))
        assert told in said
        assert "1.00×, no significant difference" not in said  # of the reference to itself


def test_every_status_has_words_and_its_reason() -> None:
    result = mixed_comparison()
    said = words(result)
    for told in [
        "not supported here",
        "out of memory",
        "gradients differ",
        "failed",
        "timed out",
        "diverged",
        "not run",
    ]:
        assert said.count(told) == 2  # in the table, and beside the reason
    for row in result.rows:
        assert row.reason in said or not row.reason
    assert "the plan recomputes 9 of 14 kinds of op; optimality gap 0" in said
    assert said.index("The machine was busy: load 3.1 on 2 cores.") < said.index("Every row")
    assert "dominated by 4" in said


def test_what_no_row_has_is_no_column() -> None:
    assert {"gradient error", "loss"} <= set(words(ONE))
    bare = measured_row("none", "fp32").model_copy(update={"gradient_relative_error": None, "final_loss": None})
    assert not {"gradient error", "loss"} & set(words(comparison([bare])))


def test_commands_are_ready_to_paste() -> None:
    result = small_comparison()
    assert result.best is not None
    assert result.best.command in words(result)
    assert "bptool compare --from grid.jsonl" in words(result)
    awkward = measured_row("full", "fp32").model_copy(update={"settings": {"a.b": "two words", "c.d": True, "e.f": 2}})
    (command,) = [w for w in words(comparison([awkward])) if w.startswith("bptool train")]
    assert shlex.split(command)[2:] == ["tiny", "training.steps=20", "a.b=two words", "c.d=true", "e.f=2"]


def test_a_prediction_says_that_nothing_was_run() -> None:
    text = " ".join(words(predicted_comparison()))
    assert "predicted for H200, nothing was run" in text
    assert "measured" not in text


def test_the_front_is_of_what_is_known() -> None:
    assert "in memory, time and gradient error at once" in " ".join(words(small_comparison()))
    assert "in memory and time at once" in " ".join(words(predicted_comparison()))


def test_an_interrupted_grid_says_so() -> None:
    assert any("interrupted" in one for one in words(small_comparison({"interrupted": True})))
    assert not any("interrupted" in one for one in words(small_comparison()))


def test_hostile_names_are_words() -> None:
    page = WebPage(rendered(hostile_comparison()))
    assert HOSTILE in page.words
    assert "img" not in page.tags()
