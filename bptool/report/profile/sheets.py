"""A profile's tables, as the terminal and the page both show them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bptool.analysis.profile.result import Duration, OpCost, ProfileResult
from bptool.report.text import one_of
from bptool.units import format_bytes, format_duration, format_flops, format_rate

_LEAST_OPS = [(5,), (8,), (4,), (2,), (7,), (6,), (10,), (3,)]
_KINDS = ("forward", "recompute", "dgrad", "wgrad", "optimizer")
_MUCH = 4  # forwards: a gradient that takes more is worth a line
_DIGITS = 4  # of a ratio's terms
_PHASES = ("data", "forward", "recompute", "backward", "clip", "optimizer", "step")


class Sheet(NamedTuple):
    """A table before it is set.

    Attributes:
        title: what it is about, in a few words.
        headings: of its columns, that of the first one left empty.
        right: columns of figures.
        leave_out: columns that may go where there is no room, those of the first group first.
        words: the last column holds sentences.
        emphasized: number of the row that matters most.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()
    leave_out: Sequence[Sequence[int]] = ()
    words: bool = False
    emphasized: int | None = None


def phases(profile: ProfileResult) -> Sheet:
    """Each phase: what it does, how long it takes, what was predicted, what it holds."""
    rows = [row for phase in _PHASES if (row := _phase_row(profile, phase))]
    headings = ["", "FLOPs", "time", "10% to 90%", "share", "predicted", "error", "peak memory"]
    return Sheet(
        "phase", headings, rows, right=range(1, 8), leave_out=[(3,), (6,), (5,), (7,), (4,)], emphasized=len(rows) - 1
    )


def _phase_row(profile: ProfileResult, phase: str) -> list[str]:
    """Empty where nothing is known of it."""
    duration = profile.time.of(phase) if profile.time else None
    counts = [one.flops + one.pointwise_flops for one in profile.phases if phase in (one.phase, "step")]
    predicted = {one.phase: one for one in profile.predicted.phases} if profile.predicted else {}
    held = {one.phase: one.peak_allocated_bytes for one in profile.memory}
    foreseen, measured = predicted.get(phase), duration.median_s if duration else None
    seconds, error = (foreseen.predicted_s, foreseen.relative_error) if foreseen else (None, None)
    if phase == "step" and profile.predicted:
        seconds = profile.predicted.step_s
        error = seconds / measured - 1 if measured else None
    if duration is None and not counts and seconds is None and phase not in held:
        return []
    return [
        phase,
        format_flops(sum(counts)) if sum(counts) else "",
        format_duration(measured) if measured is not None else "",
        _spread(duration),
        f"{measured / profile.time.step.median_s:.1%}" if measured is not None and profile.time else "",
        format_duration(seconds) if seconds is not None else "",
        f"{error:+.1%}" if error is not None else "",
        format_bytes(max(held.values()) if phase == "step" else held[phase])
        if held and phase in (*held, "step")
        else "",
    ]


def _spread(duration: Duration | None) -> str:
    if duration is None or len(duration.samples_s) < 2:
        return ""
    return f"{format_duration(duration.p10_s)} to {format_duration(duration.p90_s)}"


def operations(profile: ProfileResult, most: int = 16) -> Sheet:
    """The operations that cost the most, and what is left of them."""
    ops = sorted(profile.ops, key=op_weight, reverse=True)
    timed = profile.time is not None
    total = sum(map(op_weight, ops)) or 1.0
    rows = [_op_row(op, total) for op in ops[:most]]
    if len(ops) > most:
        rows.append(_rest_row(ops[most:], total))
    time = "time" if timed else "at least"
    headings = ["", "for", "calls", "FLOPs", "moved", "FLOP/B", "roof", "reached", "could be", time, "share"]
    if not timed:
        rows = [[*row[:7], "", "", *row[9:]] for row in rows]
    return Sheet("operation", headings, rows, right=(2, 3, 4, 5, 7, 8, 9, 10), leave_out=_LEAST_OPS)


def op_weight(op: OpCost) -> float:
    """Seconds, measured ones if there are any; FLOPs where none are known (then none are for any)."""
    known = op.duration_s if op.duration_s is not None else op.predicted_s
    return known if known is not None else float(op.flops + op.pointwise_flops)


def _op_row(op: OpCost, total: float) -> list[str]:
    work, seconds = op.flops + op.pointwise_flops, op.duration_s if op.duration_s is not None else op.predicted_s
    return [
        op.op,
        op.kind,
        f"{op.calls:,}",
        format_flops(work) if work else "none",
        format_bytes(op.bytes_moved),
        f"{op.intensity:.1f}" if op.intensity is not None else "",
        op.bound or "",
        format_rate(work / op.duration_s, "FLOP") if op.duration_s and work else "",
        format_duration(op.predicted_s) if op.predicted_s is not None else "",
        format_duration(seconds) if seconds is not None else "",
        f"{op_weight(op) / total:.1%}",
    ]


def _rest_row(ops: Sequence[OpCost], total: float) -> list[str]:
    known = [seconds for op in ops if (seconds := op.duration_s if op.duration_s is not None else op.predicted_s)]
    work = sum(op.flops + op.pointwise_flops for op in ops)
    return [
        f"{len(ops)} more",
        "",
        f"{sum(op.calls for op in ops):,}",
        format_flops(work),
        format_bytes(sum(op.bytes_moved for op in ops)),
        *("", "", "", ""),
        format_duration(sum(known)) if known else "",
        f"{sum(map(op_weight, ops)) / total:.1%}",
    ]


def unexplained(profile: ProfileResult) -> Sheet:
    """What of each phase's time the operations account for."""
    rows = [
        [
            one.phase,
            format_duration(one.measured_s),
            format_duration(one.operations_s),
            format_duration(one.outside_s),
            signed_duration(one.unexplained_s),
            f"{one.unexplained_s / one.measured_s:+.1%}" if one.measured_s else "",
        ]
        for one in profile.unexplained
    ]
    headings = ["", "measured", "in operations", "between them", "unexplained", ""]
    return Sheet("accounted for", headings, rows, right=range(1, 6), leave_out=[(1,), (5,), (2, 3)])


def signed_duration(seconds: float) -> str:
    """A difference of two durations."""
    return f"{'-' if seconds < 0 else '+'}{format_duration(abs(seconds))}"


def ratio(profile: ProfileResult) -> Sheet | None:
    """Why the backward's FLOPs are not twice the forward's; None where the forward has none."""
    found = profile.flops.backward_over_forward
    if found is None:
        return None
    terms = [(term.name, term.excess_over_two, term.detail) for term in profile.ratio_terms]
    alone = " without recomputation" if profile.recomputes_in_backward else ""
    return _terms(f"why the ratio is {found:.{_DIGITS}f}{alone}", "a layer's two gradients", 2, terms, found)


def recompute(profile: ProfileResult) -> Sheet | None:
    """Why recomputation is not one more forward; None where there is none."""
    if not profile.recompute_terms or not profile.flops.forward_flops:
        return None
    found = profile.flops.recompute_flops / profile.flops.forward_flops
    terms = [(term.name, term.excess_over_one, term.detail) for term in profile.recompute_terms]
    return _terms(f"recompute, {found:.{_DIGITS}f} forwards", "all of a forward", 1, terms, found)


def _terms(title: str, base: str, whole: int, terms: Sequence[tuple[str, float, str]], found: float) -> Sheet:
    """Names, excesses and details, beginning with the rule of thumb and ending with what was found."""
    printed = adding_up([value for _, value, _ in terms], round(found, _DIGITS) - whole, _DIGITS)
    rows = [[base, f"{whole:.{_DIGITS}f}", ""]]
    rows += [[name, value, detail] for (name, _, detail), value in zip(terms, printed, strict=True)]
    rows.append(["together", f"{found:.{_DIGITS}f}", ""])
    return Sheet(title, ["", "forwards", ""], rows, right=(1,), words=True, emphasized=len(rows) - 1)


def adding_up(values: Sequence[float], total: float, digits: int) -> list[str]:
    """Signed figures of so many decimals, each rounded up or down so that they add up to `total` as they are printed.

    `values` are what `total` is the sum of, but for its own rounding; those that lie the furthest above are rounded up.
    """
    unit = 10**digits
    floors = [math.floor(value * unit) for value in values]
    missing = round(total * unit) - sum(floors)
    by_rest = sorted(range(len(values)), key=lambda i: floors[i] - values[i] * unit)
    for i in by_rest[: max(missing, 0)]:
        floors[i] += 1
    return [f"{floor / unit:+.{digits}f}" if floor else f"{0:.{digits}f}" for floor in floors]


def conventions(profile: ProfileResult) -> Sheet:
    """Model FLOPs of one token, or whatever a step works off, in every way that they are counted."""
    rows = [
        [
            one.name + (" <- the headline" if one.headline else ""),
            one.formula,
            format_flops(one.flops_per_unit),
            f"{one.mfu:.1%}" if one.mfu is not None else "",
            one.counts,
        ]
        for one in profile.conventions
    ]
    headings = ["", "formula", f"a {one_of(profile.unit)}", "MFU", "counts"]
    headline = next((i for i, one in enumerate(profile.conventions) if one.headline), None)
    return Sheet("MFU as others count", headings, rows, right=(2, 3), words=True, emphasized=headline, leave_out=[(1,)])


def without_flops(profile: ProfileResult, most: int = 8) -> Sheet | None:
    """Operations that take time and do no matrix product; None where nothing was timed.

    The longest of them, and what is much longer than its own forward.
    """
    timed = [op for op in profile.ops if op.duration_s]
    idle: dict[str, list[OpCost]] = {}
    for op in sorted((op for op in timed if not op.flops), key=op_weight, reverse=True):
        idle.setdefault(op.op, []).append(op)
    if not idle or profile.time is None:
        return None
    names = sorted(idle, key=lambda name: -_seconds(idle[name]))
    shown = [name for i, name in enumerate(names) if i < most or _forwards(name, timed) > _MUCH]
    rest = [op for name in names if name not in shown for op in idle[name]]
    everything, total = [op for ops in idle.values() for op in ops], _seconds(timed)
    rows = [[name, _kinds(idle[name]), *_time_cells(idle[name], total), _as_forwards(name, timed)] for name in shown]
    rows += [[f"{len(names) - len(shown)} more", "", *_time_cells(rest, total), ""]] if rest else []
    rows.append(["together", "", *_time_cells(everything, total), ""])
    headings = ["", "for", "time", "share", ""]
    return Sheet("time without products", headings, rows, right=(2, 3), leave_out=[(1,), (3,)], words=True)


def _seconds(ops: Iterable[OpCost]) -> float:
    return sum(op.duration_s or 0.0 for op in ops)


def _kinds(ops: Iterable[OpCost]) -> str:
    return ", ".join(sorted({op.kind for op in ops}, key=_KINDS.index))


def _time_cells(ops: Sequence[OpCost], total: float) -> list[str]:
    return [format_duration(_seconds(ops)), f"{_seconds(ops) / total:.1%}"]


def _as_forwards(name: str, ops: Sequence[OpCost]) -> str:
    """`no product, 96.0 forwards of embedding`: a gradient beside the operation that it is of."""
    forwards = _forwards(name, ops)
    return f"no product, {forwards:,.1f} forwards of {_forward_of(name)}" if forwards else ""


def _forwards(name: str, ops: Sequence[OpCost]) -> float:
    """How many forwards' time the gradient of an operation takes; 0 where it is none, or its forward is not known."""
    found = [op for op in ops if op.kind == "forward" and op.op.lstrip("_") == _forward_of(name) != name.lstrip("_")]
    return _seconds(op for op in ops if op.op == name) / _seconds(found) if found else 0.0


def _forward_of(name: str) -> str:
    return re.sub(r"(_dense)?_backward(_data)?$", "", name.lstrip("_"))
