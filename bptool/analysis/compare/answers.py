"""From a grid's file to its Result: rows side by side. All of it is computed again whenever a file is read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cache

from bptool.analysis.compare.entries import Entry, Header
from bptool.analysis.compare.front import Point, dominated_by
from bptool.analysis.compare.ratios import Rounds, counted_ratio, ratio
from bptool.analysis.compare.result import Best, CompareResult, CompareRow, Ratio
from bptool.analysis.compare.row_figures import Found, by_row, diverged, figures
from bptool.config.axes import labels, shown_setting

_NOTABLE = 1.05
"""A ratio of times that counts however unsure it is: a row that seems so much faster is not put behind others for want
of rounds."""


def compared(
    header: Header, entries: Sequence[Entry], *, fit_bytes: int | None = None, interrupted: bool = False
) -> CompareResult:
    """The Result.

    Args:
        fit_bytes: what a row must fit into to be the best; None: it is not asked.
        interrupted: whether the grid was stopped before its end.
    """
    found = by_row(header, entries)
    names = labels(header.rows)
    rows = [figures(header, index, names[index], known) for index, known in enumerate(found)]
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


def _first_ok(rows: Sequence[CompareRow], otherwise: int) -> int:
    return next((index for index, row in enumerate(rows) if row.status == "ok"), otherwise)


def _with_divergence(row: CompareRow, found: Found, reference: Found) -> CompareRow:
    """Losses of all rows are of the same weights and batches, so that they can be laid beside the reference's."""
    reason = ""
    for run in found.good if row.status == "ok" else ():
        reason = reason or diverged(run.losses, reference.good[0].losses if reference.good else [])
    return row.model_copy(update={"status": "diverged", "reason": reason}) if reason else row


def _with_ratios(
    header: Header, rows: Sequence[CompareRow], found: Sequence[Found], reference: int
) -> list[CompareRow]:
    base = memory(rows[reference])

    def of(index: int, row: CompareRow) -> CompareRow:
        mine, time = memory(row), _time_ratio(header, found, index, reference)
        return row.model_copy(update={"peak_ratio": mine / base if mine and base else None, "time_ratio": time})

    return [of(index, row) for index, row in enumerate(rows)]


def memory(row: CompareRow) -> int | None:
    """What is compared: the measured peak, or the predicted one where nothing was run."""
    return row.predicted_peak_bytes if row.measured_peak_bytes is None else row.measured_peak_bytes


def _time_ratio(header: Header, found: Sequence[Found], mine: int, other: int) -> Ratio | None:
    if mine == other:
        known = found[mine].good if header.mode == "measure" else _predicted_time(found[mine])
        return Ratio(value=1.0, low=None, high=None, significant=False) if known else None
    if header.mode == "measure":
        return ratio(_rounds(found[mine]), _rounds(found[other]))
    one, two = _predicted_time(found[mine]), _predicted_time(found[other])
    return counted_ratio(one, two) if one and two else None


def _rounds(found: Found) -> Rounds:
    return {run.round: [step.step_s / step.units for step in run.steps] for run in found.good}


def _predicted_time(found: Found) -> float | None:
    """Seconds a unit."""
    known = found.prediction
    return known.step_s / known.units if known and known.step_s and known.units else None


def _with_front(header: Header, rows: Sequence[CompareRow], found: Sequence[Found]) -> list[CompareRow]:
    """Rows that are `ok` and have a memory and a time are on the front, or behind rows of it."""
    inside = [i for i, row in enumerate(rows) if row.status == "ok" and memory(row) is not None and row.tokens_per_s]
    points = [Point(memory(rows[i]) or 0, rows[i].gradient_relative_error) for i in inside]

    @cache
    def faster(one: int, other: int) -> bool:
        time = _time_ratio(header, found, inside[one], inside[other])
        return time is not None and (time.significant or time.value < 1 / _NOTABLE) and time.value < 1

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
    """What a limit is compared with: the predicted total, which a measured peak takes the place of the predicted in."""
    peak, total, measured = row.predicted_peak_bytes, row.predicted_total_bytes, row.measured_peak_bytes
    if measured is None:
        return total
    return measured if peak is None or total is None else measured + total - peak


def train_command(header: Header, row: int) -> str:
    """What trains with a row's settings, ready to paste."""
    settings = [f"{key}={shown_setting(value)}" for key, value in header.rows[row].items()]
    return shlex.join(["bptool", "train", header.target, *header.overrides, *settings])


def _warnings(
    header: Header, rows: Sequence[CompareRow], found: Sequence[Found], reference: int, *, interrupted: bool
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
