"""A comparison as a person reads it: the answer first, the next command last."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence

from bptool.analysis.compare.answers import memory, needed_bytes
from bptool.analysis.compare.result import CompareResult, CompareRow
from bptool.report.compare.points import edge
from bptool.report.scale import SECOND_UNITS, Scale, Units, scale_of
from bptool.report.table import labelled, sentence, table
from bptool.report.text import next_commands
from bptool.units import GIB, KIB, MIB, TIB, format_bytes, format_count, format_duration

_BYTE_UNITS: Units = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1, "B"))
_ALIKE = "~"
_AGAIN, _SPREAD = "again", "spread"
_TABLE_WIDTH = 100


def render(result: CompareResult, *, width: int = _TABLE_WIDTH, picture: str = "", file: str = "") -> str:
    """The report.

    Args:
        width: most characters of a line.
        picture: memory against time, drawn already; empty: none.
        file: the grid's, for the next command.
    """
    costs = _costs(result, width)
    blocks = [
        _wrapped(" ".join(_answer(result)), width),
        costs,
        *_learning(result, width),
        *_legend(result, costs.partition("\n")[0], width),
        *([picture.rstrip("\n")] if picture else []),
        *_reasons(result, width),
        *_notes(result, width),
        *(["doubtful\n" + "\n".join(sentence(one, width) for one in result.warnings)] if result.warnings else []),
        next_commands(_next(result, file)),
    ]
    return "\n\n".join(blocks)


def _wrapped(text: str, width: int) -> str:
    return sentence(text, width, indent="")


def _answer(result: CompareResult) -> Iterator[str]:
    """What is best, in a sentence or two."""
    asked = " ".join([result.target, *result.overrides])
    how = "predicted for" if result.mode == "predict" else "on"
    yield f"{asked} {how} {result.device_name}:"
    on_front = [row for row in result.rows if row.on_front]
    if result.fit_bytes is not None:
        yield from _fitting(result)
        return
    if not on_front:
        yield "no row has figures to compare."
        return
    least = min(on_front, key=lambda row: memory(row) or 0)
    fastest = max(on_front, key=lambda row: row.tokens_per_s or 0)
    if least is fastest:
        yield f"{least.label} is best, with {_peak(least)} and {_step(least)}."
    else:
        yield f"{fastest.label} is the fastest, {_step(fastest)} with {_peak(fastest)};"
        yield f"{least.label} takes the least memory, {_peak(least)} with {_step(least)}."
    verb = "is" if len(on_front) == 1 else "are"
    yield f"{len(on_front)} of {len(result.rows)} rows {verb} on the front of {_compared(result)}."


def _fitting(result: CompareResult) -> Iterator[str]:
    limit = format_bytes(result.fit_bytes or 0)
    if result.best:
        row = result.rows[result.best.row]
        yield f"{row.label} is the fastest that fits {limit}: it needs {format_bytes(result.best.needed_bytes)},"
        yield f"{_step(row)}."
        return
    needs = [(n, row.label) for row in result.rows if row.status == "ok" and (n := needed_bytes(row)) is not None]
    yield f"nothing fits {limit}."
    if needs:
        n_bytes, label = min(needs)
        yield f"{label} needs the least, {format_bytes(n_bytes)}."


def _compared(result: CompareResult) -> str:
    """What the front is of: gradients are not known where nothing was run."""
    if any(row.gradient_relative_error is not None for row in result.rows):
        return "memory, time and gradient error"
    return "memory and time"


def _peak(row: CompareRow) -> str:
    ratio = "" if row.peak_ratio in (None, 1.0) else f" ({row.peak_ratio:.2f}x)"
    return f"a peak of {format_bytes(memory(row) or 0)}{ratio}"


def _step(row: CompareRow) -> str:
    seconds = row.step_s.median if row.step_s else row.predicted_step_s
    if seconds is None:
        return "its time is not known"
    compared = row.time_ratio
    ratio = "" if compared is None or compared.value == 1 else f" ({_ratio(row)})"
    return f"{format_duration(seconds)} a step{ratio}"


def _costs(result: CompareResult, width: int) -> str:
    """What each row costs: one unit a column."""
    bytes_in = scale_of(max((memory(row) or 0 for row in result.rows), default=0), _BYTE_UNITS)
    seconds_in = scale_of(max((_seconds(result, row) or 0 for row in result.rows), default=0), SECOND_UNITS)
    predicts, besides = result.mode == "predict", _on_front_besides(result)
    columns: list[tuple[str, Callable[[int, CompareRow], str]]] = [
        ("settings", lambda i, row: _numbered(result, i)),
        (f"peak {bytes_in.unit}", lambda i, row: _in(bytes_in, memory(row))),
        ("predicted", lambda i, row: _prediction_error(row)),
        ("x", lambda i, row: "" if row.peak_ratio is None else f"{row.peak_ratio:.2f}"),
        (f"needs {bytes_in.unit}" if predicts else "", lambda i, row: _in(bytes_in, _total(result, row))),
        (f"step {seconds_in.unit}", lambda i, row: _in(seconds_in, _seconds(result, row))),
        (_SPREAD, lambda i, row: _spread(row)),
        ("x", lambda i, row: _ratio(row, "")),
        (f"{result.unit}/s", lambda i, row: "" if row.tokens_per_s is None else format_count(row.tokens_per_s)),
        (_AGAIN, lambda i, row: "" if row.recompute_flops_share is None else f"{row.recompute_flops_share:.1%}"),
        ("front", lambda i, row: standing(result, row) + ("*" if i in besides else "")),
    ]
    cells = [
        [name for name, _ in columns],
        *([cell(i, row) for _, cell in columns] for i, row in enumerate(result.rows)),
    ]
    return table(cells, width=width, right=range(1, len(columns) - 1), leave_out=[(8,), (9,), (6,), (2,)])


def _numbered(result: CompareResult, i: int) -> str:
    """A row's number, which names it elsewhere, and its settings."""
    return f"{i + 1:>{len(str(len(result.rows)))}} {result.rows[i].label}"


def standing(result: CompareResult, row: CompareRow) -> str:
    """Where a row stands: on the front, behind others, or not among them; the best one may be behind by a hair."""
    behind = "by " + ", ".join(str(other + 1) for other in row.dominated_by) if row.dominated_by else ""
    if result.best and result.rows[result.best.row] is row:
        return ", ".join(filter(None, ("best", behind)))
    if row.on_front:
        return "front"
    return behind or ("" if row.status == "ok" else row.status.replace("_", " "))


def _on_front_besides(result: CompareResult) -> set[int]:
    """Rows of the front that another row of it matches in both memory and time."""
    plain = {i for i, row in enumerate(result.rows) if row.on_front and standing(result, row) == "front"}
    return plain - edge(result) if edge(result) else set()


def _in(scale: Scale, value: float | None) -> str:
    return "" if value is None else scale.text(value)


def _seconds(result: CompareResult, row: CompareRow) -> float | None:
    """Of a step; a prediction is none of a row that was to be run."""
    if result.mode == "predict":
        return row.predicted_step_s
    return row.step_s.median if row.step_s else None


def _total(result: CompareResult, row: CompareRow) -> int | None:
    """What a GPU must have free, which is more than the peak; a CPU's is the same."""
    return row.predicted_total_bytes if result.mode == "predict" and result.device == "cuda" else None


def _prediction_error(row: CompareRow) -> str:
    """How far the predicted peak is off, where there is a measured one."""
    if row.measured_peak_bytes is None or row.predicted_peak_bytes is None:
        return ""
    if row.measured_peak_bytes == row.predicted_peak_bytes:
        return "exact"
    return f"{row.predicted_peak_bytes / row.measured_peak_bytes - 1:+.2%}"


def _spread(row: CompareRow) -> str:
    """Half of what lies between the tenth and the ninetieth percentile, as a share of the median."""
    if row.step_s is None or len(row.step_s.samples) < 2:
        return ""
    return f"±{(row.step_s.p90 - row.step_s.p10) / 2 / row.step_s.median:.1%}"


def _ratio(row: CompareRow, unit: str = "x") -> str:
    """Time for the same work over the reference's; `~`: no significant difference."""
    found = row.time_ratio
    if found is None:
        return ""
    alike = found.low is not None and not found.significant
    return f"{_ALIKE if alike else ''}{found.value:.2f}{unit}"


def _learning(result: CompareResult, width: int) -> list[str]:
    """How right each row is, where that was measured."""
    rows = [["gradients and loss", "error", "worst layer", "its error", "first loss", "last loss"]]
    for i, row in enumerate(result.rows):
        figures = [_error(row.gradient_relative_error), row.worst_layer or "", _error(row.worst_layer_relative_error)]
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (row.first_loss, row.final_loss)]
        if any([*figures, *losses]):
            rows.append([_numbered(result, i), *figures, *losses])
    return [table(rows, width=width, right=(1, 3, 4, 5), leave_out=[(4,), (3,), (2,)])] if len(rows) > 1 else []


def _error(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def _legend(result: CompareResult, heading: str, width: int) -> list[str]:
    """What the columns are, in words: those that the width has left in the heading."""
    reference = result.rows[result.reference]
    words = [f"x: over row {result.reference + 1} ({reference.label}); time for the same {result.unit}"]
    if any(row.time_ratio and row.time_ratio.low is not None and not row.time_ratio.significant for row in result.rows):
        words.append(f"{_ALIKE}: no significant difference, as 1 lies in the 95% interval")
    if any(row.recompute_flops_share for row in result.rows) and _AGAIN in heading:
        words.append(f"{_AGAIN}: FLOPs of recomputation, of all of forward, backward and recomputation")
    if result.mode == "measure" and _SPREAD in heading:
        words.append(f"{_SPREAD}: half of tenth to ninetieth percentile")
    if any(row.dominated_by for row in result.rows):
        words.append(f"by 2: row 2 is no worse in {_compared(result)}, and better in one")
        if result.mode == "measure":
            words.append("a time is shorter where that is significant, or 5% and more; an error is less by 5% and more")
    if _on_front_besides(result):
        words.append(
            "front*: another row of the front is as small and as fast, but its gradient error is larger, or ties"
        )
    if result.mode == "predict":
        words.append("gradient errors are not known before rows are run")
    if result.gradient_reference:
        words.append(f"error: of the gradient, against {result.gradient_reference}'s")
    return [_wrapped("; ".join(words) + ".", width)]


def _reasons(result: CompareResult, width: int) -> list[str]:
    """Why rows are not compared; one reason is told once."""
    by_reason: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(result.rows):
        if row.status != "ok":
            by_reason.setdefault((row.status, row.reason), []).append(i)
    lines = [(_numbers(rows), f"{status.replace('_', ' ')}: {reason}") for (status, reason), rows in by_reason.items()]
    return ["not compared\n" + labelled(lines, width)] if lines else []


def _numbers(rows: Sequence[int]) -> str:
    return ", ".join(str(row + 1) for row in rows)


def _notes(result: CompareResult, width: int) -> list[str]:
    """A note that several rows have is told once."""
    rows_of: dict[str, list[int]] = {}
    for i, row in enumerate(result.rows):
        for note in row.notes:
            rows_of.setdefault(note, []).append(i)
    lines = [(_numbers(rows), note) for note, rows in rows_of.items()]
    return ["of single rows\n" + labelled(lines, width)] if lines else []


def _next(result: CompareResult, file: str) -> Sequence[str]:
    """Train with the best row; with the fastest on the front where none was asked for."""
    if result.best:
        return [result.best.command]
    shown = shlex.quote(file) if file else "FILE"
    if result.fit_bytes is None and any(row.on_front for row in result.rows):
        again = f"bptool compare --from {shown} --fit {_round_size(result)} --html compare.html"
        return [again, *([_measured_too(result)] if result.mode == "predict" and result.device == "cpu" else [])]
    return [f"bptool compare --from {shown} --html compare.html"]


def _measured_too(result: CompareResult) -> str:
    axes = [f"{key}={','.join(values)}" for key, values in result.axes.items()]
    return shlex.join(["bptool", "compare", result.target, *result.overrides, *axes, "--measure"])


def _round_size(result: CompareResult) -> str:
    """A limit that leaves a choice: what the fastest row on the front needs, rounded up."""
    fastest = max((row for row in result.rows if row.on_front), key=lambda row: row.tokens_per_s or 0)
    n_bytes = needed_bytes(fastest) or 1
    size, unit = (GIB, "GiB") if n_bytes >= GIB else (MIB, "MiB")
    return f"{-(-n_bytes // size)}{unit}"
