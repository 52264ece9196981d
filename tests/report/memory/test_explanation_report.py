"""The audit as text: every term on a line, its figures in columns, its reasons below."""

from __future__ import annotations

import pytest
from small_runs import small_config

from bptool.analysis.closed_forms.explanation import BytesPerParameter, ExplainedTerm, Explanation, explain
from bptool.analysis.memory.simulation import simulate
from bptool.report.memory.explanation import render_explanation
from bptool.training.workload import transformer_workload


def term(name: str, predicted: int | None, ledger: int, why: str = "", parts: int = 0) -> ExplainedTerm:
    return ExplainedTerm(
        name=name,
        formula="" if predicted is None else f"4·P = 4·{(predicted // 4):,}",
        source="" if predicted is None else "a book",
        instant="when it is over",
        predicted_bytes=predicted,
        ledger_bytes=ledger,
        difference_bytes=None if predicted is None else ledger - predicted,
        why=why,
        parts=[term(f"part {i}", 8, 8, "aten.mul: it is wanted") for i in range(parts)],
    )


def explanation(terms: list[ExplainedTerm], peak: list[ExplainedTerm]) -> Explanation:
    return Explanation(
        terms=terms,
        literature=[],
        bytes_per_parameter=[
            BytesPerParameter(name="weights", per_parameter_bytes=4, lasting=True),
            BytesPerParameter(name="moments", per_parameter_bytes=8.5, lasting=True),
            BytesPerParameter(name="copies", per_parameter_bytes=2, lasting=False),
        ],
        peak=peak,
        peak_instant="backward, aten.mul in blocks.3",
        peak_predicted_bytes=1,
        peak_ledger_bytes=2,
        no_closed_form=[],
        verdict="All is well.",
    )


def test_a_page_by_hand() -> None:
    shown = explanation(
        [term("weights", 4096, 4096), term("gradients", 4096, 2048, "half is frozen")],
        [term("rest", None, 512, "none")],
    )
    assert render_explanation(shown).split("\n") == [
        "closed forms and the ledger",
        "             predicted    ledger  ledger - predicted  formula",
        "  weights     4.00 KiB  4.00 KiB                   0  4·P = 4·1,024",
        "  gradients   4.00 KiB  2.00 KiB           -2.00 KiB  4·P = 4·1,024",
        "  weights: a book.",
        "  gradients: a book.",
        "  gradients: half is frozen.",
        "",
        "bytes a parameter",
        "  weights     4.00",
        "  moments     8.50",
        "  together   12.50",
        "  copies      2.00",
        "",
        "at the peak (backward, aten.mul in blocks.3)",
        "        predicted  ledger  ledger - predicted  formula",
        "  rest       none   512 B",
        "  rest: none.",
        "",
        "All is well.",
    ]


def test_parts_are_indented_and_their_reasons_said_once() -> None:
    lines = render_explanation(explanation([term("block", 16, 16, parts=2)], [])).split("\n")
    assert [line.split()[:2] for line in lines if line.startswith("    part")] == [["part", "0"], ["part", "1"]]
    assert lines.count("  block: aten.mul: it is wanted.") == 1


def test_names_cannot_steer_a_terminal() -> None:
    text = render_explanation(explanation([term("a\x1b[2Jb", 4, 4)], [term("rest", None, 1, "made by \x1b[2J")]))
    assert "\x1b" not in text
    assert "\\x1b" in text


@pytest.mark.parametrize("mode", ["fp32", "bf16-mixed"])
def test_of_a_real_step_every_column_is_aligned(mode: str) -> None:
    config = small_config({"precision.mode": mode})
    found = explain(config, simulate(config, transformer_workload(config)))
    text = render_explanation(found)
    assert found.verdict in text
    for table in text.split("\n\n")[0], text.split("\n\n")[-2]:
        head, *rows = table.split("\n")[1:]
        at = head.index("formula")
        assert all(row[at - 1] == " " for row in rows if len(row) > at and "·" in row and " = " in row)
