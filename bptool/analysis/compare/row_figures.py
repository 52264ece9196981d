"""What a grid's file says of each row by itself: its status, and its figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from bptool.analysis.compare.entries import Entry, GradientComparison, Header, Prediction, RowRun
from bptool.analysis.compare.result import CompareRow, Status, StepTimes


@dataclass
class Found:
    """What the file knows of a row."""

    prediction: Prediction | None = None
    gradient: GradientComparison | None = None
    runs: list[RowRun] = field(default_factory=list)

    @property
    def good(self) -> list[RowRun]:
        """Runs that came to their end."""
        return [run for run in self.runs if run.status == "ok" and run.steps]


def by_row(header: Header, entries: Sequence[Entry]) -> list[Found]:
    """What was found out of each row; of two entries about one thing the later counts."""
    found = [Found() for _ in header.rows]
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


def figures(header: Header, index: int, label: str, found: Found) -> CompareRow:
    """The row, before it is compared with others."""
    status, reason = _status(header, found)
    notes = _notes(found, reason)
    row = CompareRow(settings=header.rows[index], label=label, status=status, reason=reason, notes=notes)
    return row.model_copy(update=_predicted(header, found) | _measured(found) | _gradient(found))


def _status(header: Header, found: Found) -> tuple[Status, str]:
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


def _notes(found: Found, told: str) -> list[str]:
    notes = list(found.prediction.notes) if found.prediction else []
    if found.gradient and found.gradient.status not in ("ok", "gradients_differ") and found.gradient.reason != told:
        notes.append(f"gradient not compared: {found.gradient.reason or found.gradient.status}")
    return notes


def _predicted(header: Header, found: Found) -> dict[str, Any]:
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


def _measured(found: Found) -> dict[str, Any]:
    runs = found.good
    if not runs:
        return {}
    steps = [step for run in runs for step in run.steps]
    samples = [step.step_s for step in steps]
    p10, median, p90 = np.percentile(samples, [10, 50, 90]).tolist()
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    phases = {
        key: _median([getattr(step, key) for step in steps]) for key in ("forward_s", "recompute_s", "backward_s")
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


def _median(samples: Sequence[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [sample for sample in samples if sample is not None]
    return statistics.median(known) if len(known) == len(samples) else None


def _gradient(found: Found) -> dict[str, Any]:
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
