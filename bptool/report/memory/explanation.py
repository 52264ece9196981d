"""The audit of an estimate as aligned text: closed form, formula, the ledger's count, and why they differ."""

from __future__ import annotations

from collections.abc import Sequence

from bptool.analysis.closed_forms.explanation import ExplainedTerm, Explanation
from bptool.report.text import aligned, visible
from bptool.units import format_bytes

_WIDEST_FORMULA = 60


def render_explanation(explanation: Explanation) -> str:
    """The terms, a layer as the paper counts it, the recipe, the peak, and the verdict."""
    blocks = [_table("closed forms and the ledger", explanation.terms)]
    if explanation.literature:
        blocks.append(_table("a GPT layer in the literature, and one of this model", explanation.literature))
    blocks.append(_recipe(explanation))
    blocks.append(_table(f"at the peak ({visible(explanation.peak_instant)})", explanation.peak))
    blocks.append(visible(explanation.verdict))
    return "\n\n".join(blocks)


def _recipe(explanation: Explanation) -> str:
    recipe = explanation.bytes_per_parameter
    lasting = [row for row in recipe if row.lasting]
    rows = [(row.name, row.per_parameter_bytes) for row in lasting]
    rows += [("together", sum(row.per_parameter_bytes for row in lasting))]
    rows += [(row.name, row.per_parameter_bytes) for row in recipe if not row.lasting]
    return "bytes a parameter\n" + aligned([(name, f"{each:6.2f}") for name, each in rows])


def _table(title: str, terms: Sequence[ExplainedTerm]) -> str:
    """Names, predicted, counted and differing bytes in columns; formula and reason on lines of their own."""
    rows = [row for term in terms for row in _rows(term, 0)]
    widths = [max(len(row[column]) for row in [_HEAD, *rows]) for column in range(len(_HEAD))]
    lines = [title, _line(_HEAD, widths)]
    lines += [_line(row, widths) for row in rows]
    notes = [note for term in terms for note in _notes(term)]
    return "\n".join([*lines, *notes])


_HEAD = ("", "predicted", "ledger", "ledger - predicted", "formula")


def _rows(term: ExplainedTerm, depth: int) -> list[tuple[str, ...]]:
    predicted = "none" if term.predicted_bytes is None else format_bytes(term.predicted_bytes)
    row = (
        "  " * depth + visible(term.name),
        predicted,
        format_bytes(term.ledger_bytes),
        _difference(term.difference_bytes),
        _shortened(term.formula),
    )
    return [row, *(row for part in term.parts for row in _rows(part, depth + 1))]


def _difference(n_bytes: int | None) -> str:
    if n_bytes is None:
        return ""
    return "0" if n_bytes == 0 else f"{'+' if n_bytes > 0 else '-'}{format_bytes(abs(n_bytes))}"


def _shortened(formula: str) -> str:
    """A long sum in symbols alone, and a very long one not at all: its parts say it."""
    symbols = formula.partition(" = ")[0]
    return formula if len(formula) <= _WIDEST_FORMULA else symbols if len(symbols) <= 2 * _WIDEST_FORMULA else "the sum"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers, formula = row
    right = "  ".join(f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=False))
    return f"  {name:<{widths[0]}}  {right}  {formula}".rstrip()


def _notes(term: ExplainedTerm) -> list[str]:
    """Where a formula comes from, and why it is not what the ledger counted."""
    sentences = [term.source] if term.source and not term.parts else []
    sentences += [visible(term.why)] if term.why else []
    reasons = dict.fromkeys(visible(part.why) for part in term.parts if ": " in part.why)
    return [f"  {visible(term.name)}: {sentence}." for sentence in [*sentences, *reasons]]
