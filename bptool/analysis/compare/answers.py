"""From a grid's file to its Result. What is computed here is computed again whenever a file is read."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from bptool.analysis.compare.entries import Entry, GradientComparison, Header, Prediction, RowRun
from bptool.analysis.compare.front import Point, dominated_by
from bptool.analysis.compare.ratios import Rounds, counted_ratio, ratio
from bptool.analysis.compare.result import Best, CompareResult, CompareRow, Ratio, Status, StepTimes
from bptool.config.axes import labels, shown_setting


@dataclass
class _Found:
    """What the file knows of a row."""

    prediction: Prediction | None = None
    gradient: GradientComparison | None = None
    runs: list[RowRun] = field(default_factory=list)

    @property
    def good(self) -> list[RowRun]:
        """Runs that came to their end."""
        return [run for run in self.runs if run.status == "ok" and run.steps]


def compared(
    header: Header, entries: Sequence[Entry], *, fit_bytes: int | None = None, interrupted: bool = False
) -> CompareResult:
    """The Result.

    Args:
        fit_bytes: what a row must fit into to be the best; None: it is not asked.
        interrupted: whether the grid was stopped before its end.
    """
    found = _by_row(header, entries)
    names = labels(header.rows)
    rows = [_row(header, index, names[index], known) for index, known in enumerate(found)]
    reference = header.reference if rows[header.reference].status == "ok" else _first_ok(rows, header.reference)
    rows = [_with_divergence(row, found[i], found[reference]) for i, row in enumerate(rows)]
    rows = _with_ratios(header, rows, found, reference)
    rows = _with_front(header, rows, found)
    interrupted = interrupted or any(row.status == "not_run" for row in rows)
    return CompareResult(
        target=header.target,
        overrides=header.overrides,
        axes=header.axes,
        unit=header.unit,
        mode=header.mode,
        device=header.device,
        device_name=header.device_name,
        gradient_reference=next(
            (one.gradient.reference for one in found if one.gradient and one.gradient.reference), None
        ),
        steps=header.steps,
        rounds=header.rounds,
        reference=reference,
        rows=rows,
        fit_bytes=fit_bytes,
        best=None if fit_bytes is None else _best(header, rows, fit_bytes),
        warnings=_warnings(header, rows, found, reference, interrupted=interrupted),
        interrupted=interrupted,
    )


def _by_row(header: Header, entries: Sequence[Entry]) -> list[_Found]:
    """What was found out of each row; of two entries about one thing the later counts."""
    found = [_Found() for _ in header.rows]
    runs: dict[tuple[int, int], RowRun] = {}
    for entry in entries:
        match entry:
            case Prediction():
                found[entry.row].prediction = entry
            case GradientComparison():
                found[entry.row].gradient = entry
            case RowRun():
                runs[entry.row, entry.round] = entry
    for (row, _), run in sorted(runs.items()):
        found[row].runs.append(run)
    return found


def _first_ok(rows: Sequence[CompareRow], otherwise: int) -> int:
    return next((index for index, row in enumerate(rows) if row.status == "ok"), otherwise)


def _row(header: Header, index: int, label: str, found: _Found) -> CompareRow:
    status, reason = _status(header, found)
    row = CompareRow(settings=header.rows[index], label=label, status=status, reason=reason, notes=_notes(found))
    return row.model_copy(update=_predicted(header, found) | _measured(found) | _gradient(found))


def _status(header: Header, found: _Found) -> tuple[Status, str]:
    """The first thing that went wrong."""
    known = found.prediction
    if known and known.status != "ok":
        return known.status, known.reason
    gradient = found.gradient
    if gradient and (gradient.status == "gradients_differ" or (gradient.status != "ok" and not found.runs)):
        return gradient.status, gradient.reason
    for run in found.runs:
        if run.status != "ok":
            return run.status, run.reason
    if found.good if header.mode == "measure" else known:
        return "ok", ""
    return "not_run", "the grid was stopped before"


def _notes(found: _Found) -> list[str]:
    notes = list(found.prediction.notes) if found.prediction else []
    if found.gradient and found.gradient.status not in ("ok", "gradients_differ"):
        notes.append(f"gradient not compared: {found.gradient.reason or found.gradient.status}")
    return notes


def _predicted(header: Header, found: _Found) -> dict[str, Any]:
    """What was predicted; it also stands for what is measured where nothing is run."""
    known = found.prediction
    if known is None:
        return {}
    of_memory = {
        "predicted_peak_bytes": known.peak_bytes,
        "predicted_total_bytes": known.total_bytes,
        "predicted_step_s": known.step_s,
        "predicted_category_bytes": known.category_bytes,
        "recompute_flops_share": known.recompute_flops_share,
    }
    if header.mode == "measure" or not known.step_s or known.units is None:
        return of_memory
    phases = {key: getattr(known, key) for key in ("forward_s", "recompute_s", "backward_s")}
    return of_memory | phases | {"tokens_per_s": known.units / known.step_s}


def _measured(found: _Found) -> dict[str, Any]:
    runs = found.good
    if not runs:
        return {}
    steps = [step for run in runs for step in run.steps]
    samples = [step.step_s for step in steps]
    p10, median, p90 = np.percentile(samples, [10, 50, 90]).tolist()
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    phases = {
        key: statistics.median(getattr(step, key) for step in steps)
        for key in ("forward_s", "recompute_s", "backward_s")
    }
    losses = runs[0].losses
    return {
        "step_s": StepTimes(median=median, p10=p10, p90=p90, samples=samples),
        "tokens_per_s": statistics.median(step.units for step in steps) / median,
        "measured_peak_bytes": max(peaks, default=None),
        **phases,
        "first_loss": losses[0] if losses else None,
        "final_loss": losses[-1] if losses else None,
    }


def _gradient(found: _Found) -> dict[str, Any]:
    known = found.gradient
    if known is None or known.relative_error is None:
        return {}
    worst = max(known.layers, key=lambda layer: _or_infinite(known.layers[layer]), default=None)
    return {
        "gradient_relative_error": _or_infinite(known.relative_error),
        "worst_layer": worst,
        "worst_layer_relative_error": None if worst is None else _or_infinite(known.layers[worst]),
    }


def _or_infinite(error: float) -> float:
    """NaN is as wrong as can be."""
    return math.inf if math.isnan(error) else error


def _with_divergence(row: CompareRow, found: _Found, reference: _Found) -> CompareRow:
    """Losses of all rows are of the same weights and batches, so that they can be laid beside the reference's."""
    reason = ""
    for run in found.good if row.status == "ok" else ():
        reason = reason or diverged(run.losses, reference.good[0].losses if reference.good else [])
    return row.model_copy(update={"status": "diverged", "reason": reason}) if reason else row


def diverged(losses: Sequence[float], reference: Sequence[float]) -> str:
    """Why a run's loss is said to diverge; empty where it is not.

    It is not finite, or it ends above its beginning by more than the reference's moves from any step to the next, while
    the reference's falls: batches differ, and a rise by less may be theirs.
    """
    wrong = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if wrong is not None:
        return f"its loss is {losses[wrong]} at step {wrong + 1}"
    if len(losses) < 2 or len(reference) < 2 or not reference[-1] < reference[0]:
        return ""
    noise = max(abs(after - before) for before, after in pairwise(reference))
    rise = losses[-1] - losses[0]
    if rise <= max(noise, reference[0] - reference[-1]):
        return ""
    return (
        f"its loss rose from {losses[0]:.4f} to {losses[-1]:.4f}; the reference's fell from {reference[0]:.4f} to"
        f" {reference[-1]:.4f}"
    )


def _with_ratios(
    header: Header, rows: Sequence[CompareRow], found: Sequence[_Found], reference: int
) -> list[CompareRow]:
    base = memory(rows[reference])

    def of(index: int, row: CompareRow) -> CompareRow:
        mine, time = memory(row), _time_ratio(header, found, index, reference)
        return row.model_copy(update={"peak_ratio": mine / base if mine and base else None, "time_ratio": time})

    return [of(index, row) for index, row in enumerate(rows)]


def memory(row: CompareRow) -> int | None:
    """What is compared: the measured peak, or the predicted one where nothing was run."""
    return row.predicted_peak_bytes if row.measured_peak_bytes is None else row.measured_peak_bytes


def _time_ratio(header: Header, found: Sequence[_Found], mine: int, other: int) -> Ratio | None:
    if mine == other:
        known = found[mine].good if header.mode == "measure" else _predicted_time(found[mine])
        return Ratio(value=1.0, low=None, high=None, significant=False) if known else None
    if header.mode == "measure":
        return ratio(_rounds(found[mine]), _rounds(found[other]))
    one, two = _predicted_time(found[mine]), _predicted_time(found[other])
    return counted_ratio(one, two) if one and two else None


def _rounds(found: _Found) -> Rounds:
    return {run.round: [step.step_s / step.units for step in run.steps] for run in found.good}


def _predicted_time(found: _Found) -> float | None:
    """Seconds a unit."""
    known = found.prediction
    return known.step_s / known.units if known and known.step_s and known.units else None


def _with_front(header: Header, rows: Sequence[CompareRow], found: Sequence[_Found]) -> list[CompareRow]:
    """Rows that are `ok` and have a memory and a time are on the front, or behind rows of it."""
    inside = [i for i, row in enumerate(rows) if row.status == "ok" and memory(row) is not None and row.tokens_per_s]
    points = [Point(memory(rows[i]) or 0, rows[i].gradient_relative_error) for i in inside]

    @cache
    def faster(one: int, other: int) -> bool:
        time = _time_ratio(header, found, inside[one], inside[other])
        return time is not None and time.significant and time.value < 1

    behind = dict(zip(inside, dominated_by(points, faster), strict=True))
    return [
        row.model_copy(update={"on_front": not behind[i], "dominated_by": [inside[j] for j in behind[i]]})
        if i in behind
        else row
        for i, row in enumerate(rows)
    ]


def _best(header: Header, rows: Sequence[CompareRow], fit_bytes: int) -> Best | None:
    """The row that takes least time for its tokens, of those that fit."""
    fitting = [
        (row.tokens_per_s, -index, needed)
        for index, row in enumerate(rows)
        if row.status == "ok" and row.tokens_per_s and (needed := needed_bytes(row)) is not None and needed <= fit_bytes
    ]
    if not fitting:
        return None
    _, negative, needed = max(fitting)
    index = -negative
    return Best(row=index, settings=rows[index].settings, command=train_command(header, index), needed_bytes=needed)


def needed_bytes(row: CompareRow) -> int | None:
    """What a limit is compared with: the measured peak, or the predicted total where nothing was run."""
    return row.predicted_total_bytes if row.measured_peak_bytes is None else row.measured_peak_bytes


def train_command(header: Header, row: int) -> str:
    """What trains with a row's settings, ready to paste."""
    settings = [f"{key}={shown_setting(value)}" for key, value in header.rows[row].items()]
    return shlex.join(["bptool", "train", header.target, *header.overrides, *settings])


def _warnings(
    header: Header, rows: Sequence[CompareRow], found: Sequence[_Found], reference: int, *, interrupted: bool
) -> list[str]:
    warnings = []
    if interrupted:
        warnings.append("interrupted: rows or rounds are missing; the same command with --resume goes on")
    if rows[reference].status != "ok":
        warnings.append("no row is ok, and nothing can be compared")
    elif reference != 0:
        first = rows[0].status.replace("_", " ")
        warnings.append(f"the reference is {rows[reference].label}, as the row of all first values is {first}")
    done = max((len(one.good) for one in found), default=0)
    if header.mode == "measure" and done == 1:
        warnings.append("of one round intervals leave out what differs between one process and the next: --rounds 3")
    if header.mode == "measure" and done == 2:
        warnings.append("of two rounds intervals are six times as wide as of many: --rounds 5 tells rows apart")
    return warnings
