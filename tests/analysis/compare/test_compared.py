"""What is made of a grid's file."""

from __future__ import annotations

import math
import shlex
import statistics
from typing import Any

import pytest
from compare_records import MODE, POLICY, failed_prediction, gradient, header, prediction, run

from bptool.analysis.compare.answers import compared
from bptool.analysis.compare.entries import Entry
from bptool.analysis.compare.row_figures import diverged

GIB = 2**30


def two_rounds(row: int, step_s: float, **changes: Any) -> list[Entry]:
    return [run(row, i, step_s * (1 + i / 100), **changes) for i in range(2)]


class TestFigures:
    def test_medians_are_over_all_rounds(self) -> None:
        result = compared(header(1), [run(0, 0, 1.0), run(0, 1, 2.0)])
        samples = [0.99, 1.0, 1.01, 1.98, 2.0, 2.02]
        (row,) = result.rows
        assert row.step_s is not None
        assert row.step_s.samples == pytest.approx(samples)
        assert row.step_s.median == pytest.approx(statistics.median(samples))
        assert row.step_s.p10 < row.step_s.median < row.step_s.p90
        assert row.tokens_per_s == pytest.approx(100 / statistics.median(samples))
        assert row.backward_s == pytest.approx(statistics.median(samples) / 2)
        assert (row.first_loss, row.final_loss) == (3.0, 2.0)

    def test_a_smaller_micro_batch_is_compared_by_the_token(self) -> None:
        rows = [{"training.micro_batch_size": n} for n in (8, 4)]
        entries = [*two_rounds(0, 1.0, units=800), *two_rounds(1, 0.6, units=400)]
        result = compared(header(2, rows=rows, axes={"training.micro_batch_size": ["8", "4"]}), entries)
        assert result.rows[1].time_ratio is not None
        assert result.rows[1].time_ratio.value == pytest.approx(1.2)
        assert result.rows[0].time_ratio is not None
        assert result.rows[0].time_ratio.value == 1.0

    def test_predictions_stand_for_what_was_not_run(self) -> None:
        result = compared(header(2, mode="predict"), [prediction(0), prediction(1, peak=500, step_s=1.5)])
        row = result.rows[1]
        assert (row.predicted_peak_bytes, row.measured_peak_bytes, row.step_s) == (500, None, None)
        assert row.predicted_step_s == 1.5
        assert row.tokens_per_s == pytest.approx(100 / 1.5)
        assert (row.peak_ratio, row.recompute_flops_share) == (0.5, 0.25)
        assert row.time_ratio is not None
        assert row.time_ratio.value == pytest.approx(1.5)
        assert row.time_ratio.low is None
        assert [one.on_front for one in result.rows] == [True, True]

    def test_the_worst_layer_is_named(self) -> None:
        result = compared(header(2), [run(0), gradient(0, 0.1), run(1), gradient(1, math.nan)])
        assert (result.rows[0].worst_layer, result.rows[0].worst_layer_relative_error) == ("blocks.1", 0.2)
        assert result.rows[1].gradient_relative_error == math.inf
        assert result.document()["result"]["rows"][1]["gradient_relative_error"] is None
        assert result.gradient_reference == "float64"

    def test_a_later_entry_takes_an_earlier_ones_place(self) -> None:
        result = compared(header(1), [run(0, status="failed", reason="killed"), run(0)])
        assert result.rows[0].status == "ok"


class TestStatus:
    @pytest.mark.parametrize("status", ["unsupported", "out_of_memory"])
    def test_what_is_not_run_says_why(self, status: str) -> None:
        result = compared(header(2), [prediction(0), run(0), prediction(1, status=status, reason="as it is")])
        assert (result.rows[1].status, result.rows[1].reason) == (status, "as it is")

    def test_one_bad_round_is_told(self) -> None:
        result = compared(header(2), [run(0), run(1, 0), run(1, 1, status="timed_out", reason="60 s")])
        assert (result.rows[1].status, result.rows[1].reason) == ("timed_out", "60 s")
        assert not result.rows[1].on_front

    def test_a_model_that_cannot_be_predicted_failed(self) -> None:
        row = compared(header(1, mode="predict"), [failed_prediction(0, "reads values")]).rows[0]
        assert (row.status, row.reason, row.on_front) == ("failed", "reads values", False)

    def test_a_prediction_alone_is_no_run(self) -> None:
        assert compared(header(1), [prediction(0)]).rows[0].status == "not_run"

    def test_a_reason_is_not_told_again_as_a_note(self) -> None:
        bad = gradient(1, status="failed", reason="killed", reference=None, relative_error=None, layers={})
        assert compared(header(2), [run(0), prediction(1), bad]).rows[1].notes == []
        assert compared(header(2), [run(0), prediction(1), bad, run(1)]).rows[1].notes == [
            "gradient not compared: killed"
        ]

    def test_what_was_not_reached_is_not_run(self) -> None:
        result = compared(header(2), [run(0)])
        assert result.rows[1].status == "not_run"
        assert result.interrupted
        assert "--resume" in result.warnings[0]

    def test_gradients_that_differ_are_refused_not_ranked(self) -> None:
        entries: list[Entry] = [
            run(0),
            run(1, peak=1),
            gradient(1, status="gradients_differ", reason="blocks.0.weight"),
        ]
        row = compared(header(2), entries).rows[1]
        assert (row.status, row.reason, row.on_front) == ("gradients_differ", "blocks.0.weight", False)

    def test_the_reference_is_the_first_row_that_is_ok(self) -> None:
        result = compared(header(2), [run(0, status="failed", reason="x"), run(1)])
        assert result.reference == 1
        assert any("reference" in warning for warning in result.warnings)


class TestDivergence:
    FALLS = (3.0, 2.5, 2.6, 2.0)

    @pytest.mark.parametrize(
        ("losses", "diverges"),
        [
            ((3.0, math.nan, 2.0, 2.0), True),
            ((3.0, 2.0, math.inf), True),
            ((3.0, 4.0, 5.0, 6.0), True),
            ((3.0, 3.2, 3.1, 3.4), False),  # batches differ by as much
            ((3.0, 2.5, 2.6, 2.0), False),
        ],
    )
    def test_loss(self, losses: tuple[float, ...], diverges: bool) -> None:
        assert bool(diverged(losses, self.FALLS)) == diverges

    def test_a_rise_is_nothing_where_the_reference_rises_too(self) -> None:
        assert diverged((3.0, 9.0), (3.0, 4.0)) == ""

    def test_the_row_says_so(self) -> None:
        row = compared(header(2), [run(0), run(1, losses=(3.0, 9.0))]).rows[1]
        assert row.status == "diverged"
        assert "rose from 3.0000 to 9.0000; the reference's fell from 3.0000 to 2.0000" in row.reason


class TestFront:
    def test_a_time_that_does_not_differ_is_no_advantage(self) -> None:
        """Row 1 is 1% faster in one round and slower in the other, and bigger: row 0 dominates it."""
        entries = [run(0, 0, 1.0), run(0, 1, 1.0), run(1, 0, 0.98, peak=2000), run(1, 1, 1.01, peak=2000)]
        result = compared(header(2), entries)
        assert result.rows[1].time_ratio is not None
        assert not result.rows[1].time_ratio.significant
        assert [row.dominated_by for row in result.rows] == [[], [0]]
        assert [row.on_front for row in result.rows] == [True, False]

    def test_noise_puts_no_row_behind(self) -> None:
        """Row 1 is bigger, and faster in both rounds, by far; that it may be chance is no reason to drop it."""
        entries = [run(0, 0, 1.0), run(0, 1, 1.0), run(1, 0, 0.2, peak=2000), run(1, 1, 0.9, peak=2000)]
        result = compared(header(2), entries)
        assert result.rows[1].time_ratio is not None
        assert not result.rows[1].time_ratio.significant
        assert [row.on_front for row in result.rows] == [True, True]

    def test_error_is_the_third_axis(self) -> None:
        entries = [*two_rounds(0, 2.0), gradient(0, 1e-7), *two_rounds(1, 1.0), gradient(1, 1e-2)]
        assert [row.on_front for row in compared(header(2), entries).rows] == [True, True]

    def test_indices_are_of_all_rows(self) -> None:
        entries = [run(0, status="failed", reason="x"), *two_rounds(1, 1.0, peak=500), *two_rounds(2, 2.0)]
        assert [row.dominated_by for row in compared(header(3), entries).rows] == [[], [], [1]]


class TestFit:
    ENTRIES = (
        prediction(0, peak=10 * GIB, step_s=1.0),
        prediction(1, peak=2 * GIB, step_s=2.0),
        prediction(2, peak=4 * GIB, step_s=1.5),
    )

    @pytest.mark.parametrize(("fit", "row"), [(20, 0), (9, 2), (3, 1)])
    def test_the_fastest_that_fits(self, fit: int, row: int) -> None:
        best = compared(header(3, mode="predict"), self.ENTRIES, fit_bytes=fit * GIB).best
        assert best is not None
        assert best.row == row
        assert best.needed_bytes == self.ENTRIES[row].total_bytes

    def test_none_fits(self) -> None:
        assert compared(header(3, mode="predict"), self.ENTRIES, fit_bytes=GIB).best is None

    def test_the_total_counts_not_the_peak(self) -> None:
        assert compared(header(3, mode="predict"), self.ENTRIES, fit_bytes=2 * GIB).best is None

    def test_what_was_measured_counts_before_what_was_predicted(self) -> None:
        predicted = prediction(0, peak=10 * GIB)
        assert predicted.total_bytes is not None
        reserve = predicted.total_bytes - 10 * GIB
        assert reserve > 0
        entries: list[Entry] = [predicted, run(0, peak=GIB)]
        assert compared(header(1), entries, fit_bytes=GIB + reserve - 1).best is None
        best = compared(header(1), entries, fit_bytes=GIB + reserve).best
        assert best is not None
        assert best.needed_bytes == GIB + reserve

    def test_its_command_can_be_pasted(self) -> None:
        settings = {POLICY: "budget:4GiB", MODE: "bf16-mixed", "training.compile": True, "data.source": "my text"}
        grid = header(1, rows=[settings], overrides=["model.rope={theta=1.0}"], mode="predict")
        best = compared(grid, [prediction(0)], fit_bytes=GIB).best
        assert best is not None
        assert shlex.split(best.command) == [
            *("bptool", "train", "tiny", "model.rope={theta=1.0}", f"{POLICY}=budget:4GiB", f"{MODE}=bf16-mixed"),
            *("training.compile=true", "data.source=my text"),
        ]
