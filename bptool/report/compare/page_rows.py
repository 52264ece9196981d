"""A comparison's rows on its page: the table's cells, the bars of memory, and what is read out of each."""

from __future__ import annotations

from bptool.analysis.compare.result import CompareResult, CompareRow, Ratio, Status
from bptool.report.html.parts import Column, Piece
from bptool.report.html.sortable import Figure
from bptool.report.html.stacks import Stack, Stacks
from bptool.report.memory.categories import LOOKS
from bptool.units import format_bytes, format_count, format_duration

_STATUS: dict[Status, str] = {
    "ok": "ok",
    "unsupported": "not supported here",
    "out_of_memory": "out of memory",
    "gradients_differ": "gradients differ",
    "failed": "failed",
    "timed_out": "timed out",
    "diverged": "diverged",
    "not_run": "not run",
}
_NOTHING = Figure("", None)


def small(value: float) -> str:
    """`3.2e-03`: an error relative to something."""
    return f"{value:.1e}" if value else "0"


def standing(result: CompareResult, i: int) -> str:
    """Why to choose a row or not, in few words."""
    row = result.rows[i]
    if row.status != "ok":
        return _STATUS[row.status]
    if result.best and result.best.row == i:
        return "best"
    if row.on_front:
        return "on the front"
    if row.dominated_by:
        return f"dominated by {', '.join(str(other + 1) for other in row.dominated_by)}"
    return _STATUS["ok"]


def every_row(result: CompareResult) -> tuple[list[Column], list[list[Figure]]]:
    """The table's columns, without those that no row has a figure for, and its cells."""
    measured = result.mode == "measure"
    columns = [
        *(Column("row", "number"), Column("settings", "text"), Column("standing", "text")),
        Column("measured peak" if measured else "predicted peak", "number"),
        Column("predicted peak" if measured else "needed in all", "aside number"),
        *(Column("step", "number"), Column(f"{result.unit}/s", "number"), Column("forward", "aside number")),
        *(Column("recompute", "aside number"), Column("backward", "aside number"), Column("recompute FLOPs", "number")),
        *(Column("gradient error", "number"), Column("loss", "number")),
    ]
    cells = [_cells(result, i) for i in range(len(result.rows))]
    kept = [j for j in range(len(columns)) if j < 3 or any(row[j].key is not None for row in cells)]
    return [columns[j] for j in kept], [[row[j] for j in kept] for row in cells]


def _cells(result: CompareResult, i: int) -> list[Figure]:
    row = result.rows[i]
    words = standing(result, i)
    color = "bad" if row.status != "ok" else "good" if row.on_front else ""
    predicted, total = row.predicted_peak_bytes, row.predicted_total_bytes
    peaks = (row.measured_peak_bytes, predicted) if result.mode == "measure" else (predicted, total)
    return [
        Figure(str(i + 1), float(i + 1)),
        Figure(row.label, row.label),
        Figure(words, words, kind=color),
        _bytes(peaks[0], "" if row.peak_ratio is None else f"{row.peak_ratio:.2f}×"),
        _bytes(peaks[1]),
        _step(result, i),
        Figure(format_count(row.tokens_per_s), row.tokens_per_s) if row.tokens_per_s is not None else _NOTHING,
        *(_seconds(seconds) for seconds in (row.forward_s, row.recompute_s, row.backward_s)),
        _NOTHING
        if row.recompute_flops_share is None
        else Figure(f"{row.recompute_flops_share:.1%}", row.recompute_flops_share),
        _error(row),
        _loss(row),
    ]


def _bytes(n_bytes: int | None, note: str = "") -> Figure:
    return _NOTHING if n_bytes is None else Figure(format_bytes(n_bytes), n_bytes, note)


def _seconds(seconds: float | None) -> Figure:
    if seconds is None:
        return _NOTHING
    return Figure(format_duration(seconds) if seconds else "0", seconds)


def _step(result: CompareResult, i: int) -> Figure:
    """The step's time, and its ratio to the reference's in words; a prediction is none of a row that was to be run."""
    row = result.rows[i]
    seconds = row.step_s.median if row.step_s else row.predicted_step_s if result.mode == "predict" else None
    if seconds is None:
        return _NOTHING
    is_reference = i == result.reference
    return Figure(
        format_duration(seconds), seconds, "1.00×" if is_reference else _ratio(row.time_ratio) if row.time_ratio else ""
    )


def _ratio(ratio: Ratio) -> str:
    words = f"{ratio.value:.2f}×"
    if ratio.low is None or ratio.high is None:
        return words
    if not ratio.significant and ratio.low < ratio.high:
        return f"{words}, no significant difference"
    return f"{words} ({ratio.low:.2f}\u2060–\u2060{ratio.high:.2f})" if ratio.low < ratio.high else words


def _error(row: CompareRow) -> Figure:
    error = row.gradient_relative_error
    if error is None:
        return _NOTHING
    return Figure(small(error), error, _worst(row, ".\u200b"))  # a long name may break behind a dot


def _worst(row: CompareRow, dot: str = ".") -> str:
    if row.worst_layer is None or row.worst_layer_relative_error is None:
        return ""
    return f"{small(row.worst_layer_relative_error)} in {row.worst_layer.replace('.', dot) or 'the model'}"


def _loss(row: CompareRow) -> Figure:
    if row.final_loss is None:
        return _NOTHING
    return Figure(
        f"{row.final_loss:.4f}", row.final_loss, "" if row.first_loss is None else f"from {row.first_loss:.4f}"
    )


def detail(result: CompareResult, i: int) -> str:
    """What is read out of a row, in lines."""
    row = result.rows[i]
    settings = ", ".join(f"{key}={value}" for key, value in row.settings.items())
    first = f"Row {i + 1}, {standing(result, i)}: {settings or row.label}"
    memory = [
        f"measured peak {format_bytes(row.measured_peak_bytes)}" if row.measured_peak_bytes is not None else "",
        f"predicted {format_bytes(row.predicted_peak_bytes)}" if row.predicted_peak_bytes is not None else "",
        f"{row.peak_ratio:.2f}× the reference's" if row.peak_ratio is not None else "",
    ]
    time = [
        _spread(row),
        f"{_ratio(row.time_ratio)}" if row.time_ratio else "",
        f"{format_count(row.tokens_per_s)} {result.unit}/s" if row.tokens_per_s is not None else "",
        f"recompute {row.recompute_flops_share:.1%} of FLOPs" if row.recompute_flops_share is not None else "",
    ]
    error = row.gradient_relative_error
    gradient = [
        f"gradient error {small(error)}" if error is not None else "",
        f"worst {_worst(row)}" if _worst(row) else "",
        f"loss {row.final_loss:.4f}" if row.final_loss is not None else "",
    ]
    lines = [" · ".join(word for word in words if word) for words in (memory, time, gradient)]
    return "\n".join([first, *(line for line in lines if line)])


def _spread(row: CompareRow) -> str:
    if row.step_s is None:
        return "" if row.predicted_step_s is None else f"step predicted {format_duration(row.predicted_step_s)}"
    low, high = format_duration(row.step_s.p10), format_duration(row.step_s.p90)
    return f"step {format_duration(row.step_s.median)} ({low} to {high})"


def memory_by_category(result: CompareResult) -> Stacks:
    """A bar for each row whose predicted peak is known by category, in the order of all pictures of memory."""
    known = [i for i, row in enumerate(result.rows) if any(row.predicted_category_bytes.values())]
    there = {
        category for i in known for category, n_bytes in result.rows[i].predicted_category_bytes.items() if n_bytes
    }
    marked = any(result.rows[i].measured_peak_bytes is not None for i in known)
    fit = result.fit_bytes if result.mode == "measure" else None
    return Stacks(
        description="Predicted peak memory of each row by category.",
        stacks=[_stack(result, i) for i in known],
        kinds=[(look.name, _kind(category)) for category, look in LOOKS.items() if category in there],
        mark_name="measured peak" if marked else "",
        limit=None if fit is None else (fit, f"limit {format_bytes(fit)}"),
        hint="Point at a bar to see what it holds.",
    )


def _stack(result: CompareResult, i: int) -> Stack:
    row = result.rows[i]
    held = [(look.name, row.predicted_category_bytes.get(name, 0), _kind(name)) for name, look in LOOKS.items()]
    pieces = [Piece(f"{name} {format_bytes(n_bytes)}", n_bytes, kind) for name, n_bytes, kind in held if n_bytes]
    total = row.predicted_peak_bytes if row.predicted_peak_bytes is not None else sum(n_bytes for _, n_bytes, _ in held)
    name = f"{i + 1} · {row.label}"
    measured = [f"measured {format_bytes(row.measured_peak_bytes)}"] if row.measured_peak_bytes is not None else []
    peaks = " · ".join([f"predicted peak {format_bytes(total)}", *measured])
    held_words = " · ".join(piece.label for piece in pieces)
    return Stack(name, f"{name}: {peaks}\n{held_words}", pieces, format_bytes(total), row.measured_peak_bytes)


def _kind(category: str) -> str:
    return "c-" + category.replace("_", "-")
