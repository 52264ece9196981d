"""A profile as a person reads it: the answer first, the next command last."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence

from bptool.analysis.profile.result import ProfileResult
from bptool.report.profile import modules, sheets
from bptool.report.profile.sheets import Sheet
from bptool.report.profile.work import WORK
from bptool.report.table import labelled, sentence, table
from bptool.report.text import next_commands, one_of, visible
from bptool.units import format_count, format_duration, format_flops, format_rate

_TREE_DEPTH = 4


def render(profile: ProfileResult, *, width: int = 100, picture: str = "", given: Collection[str] = ()) -> str:
    """The report, no line wider than `width` (40 or more) but for commands to paste.

    Args:
        picture: modules as an icicle, drawn already; empty: none.
        given: options for files that were asked for, such as `--html`.
    """
    before = [
        sentence(headline(profile), width, ""),
        labelled(rows(profile), width),
        _set(sheets.phases(profile), width),
    ]
    drawn = [f"{_drawn_by(profile)}\n{picture.rstrip()}"] if picture.strip() else []
    after = [
        *(_set(sheet, width) for sheet in modules.by_kind_of_work(profile, _TREE_DEPTH)),
        _set(sheets.operations(profile), width),
        *_some(sheets.without_flops(profile), width),
        *([_set(sheets.unexplained(profile), width)] if profile.unexplained else []),
        *_some(sheets.ratio(profile), width),
        *_some(sheets.recompute(profile), width),
        *([_set(sheets.conventions(profile), width)] if profile.conventions else []),
        *_without_gradients(profile, width),
        *([_sentences("assuming", profile.assumptions, width)] if profile.assumptions else []),
        next_commands(_next(profile, given)),
    ]
    return "\n\n".join([*map(visible, before), *drawn, *map(visible, after)])


def asked(profile: ProfileResult) -> str:
    """What was profiled, in the user's words."""
    return " ".join([profile.target, *profile.settings])


def headline(profile: ProfileResult) -> str:
    """The answer in a sentence."""
    flops = profile.flops_ratio
    in_flops = "no FLOPs to compare" if flops is None else f"{flops:.2f}x in FLOPs"
    where = f"{asked(profile)} on {profile.gpu or profile.device}"
    if profile.time is None:
        where += ", interrupted before a step was timed" if profile.interrupted else ""
        return f"{where}, counted: the backward is {in_flops}" + ("" if flops is None else " of the forward")
    time = profile.time
    interval = f"[{time.backward_over_forward_low:.2f} to {time.backward_over_forward_high:.2f}]"
    included = ", recomputation included," if profile.recomputes_in_backward else ""
    stopped = f", interrupted after {_steps(profile)}" if profile.interrupted else ""
    return (
        f"{where}{stopped}: the backward{included} takes {time.backward_over_forward:.2f}x the forward's time"
        f" {interval}, {in_flops}{_by_kind(profile)}"
    )


def _by_kind(profile: ProfileResult) -> str:
    """The ratio of times that the one of FLOPs is to be compared with, where that is another."""
    ratio = profile.time.backward_over_forward_by_kind if profile.time else None
    return "" if ratio is None else f"; with the loss's early gradients counted as backward: {ratio:.2f}x in time"


def _steps(profile: ProfileResult) -> str:
    n = len(profile.time.step.samples_s) if profile.time else 0
    return f"{n} timed step{'' if n == 1 else 's'}"


def rows(profile: ProfileResult) -> list[tuple[str, str]]:
    """The key figures: what they are called, and their values in words."""
    found = []
    if profile.time and profile.tokens_per_s is not None:
        speed = f"{format_count(profile.tokens_per_s)} {profile.unit}/s"
        of = f"{profile.units_per_step:,} {profile.unit if profile.units_per_step != 1 else one_of(profile.unit)}"
        step = format_duration(profile.time.step.median_s)
        found.append(("speed", f"{speed}, {step} a step of {of}, median of {_steps(profile)}"))
    if profile.predicted:
        rate = f"{format_count(profile.predicted.units_per_s)} {profile.unit}/s"
        step = format_duration(profile.predicted.step_s)
        found.append(("predicted", f"{step} a step, {rate}; {profile.predicted.basis}"))
    if profile.time:
        found += [("MFU", utilisation(profile, profile.mfu)), ("HFU", _hfu(profile))]
    found.append(("FLOPs", _flops(profile)))
    if profile.finite_differences:
        found.append(("gradients", finite_differences(profile)))
    found.append(("model", _model(profile)))
    if profile.recorder_overhead is not None:
        overhead = (
            f"{profile.recorder_overhead:+.1%} of a step's time where operations are recorded; phases are timed without"
        )
        found.append(("recorder", overhead))
    if profile.compiled:
        found.append(("compiled", "times are of the compiled model, FLOPs of the same model run eagerly"))
    return found


def utilisation(profile: ProfileResult, share: float | None) -> str:
    """A share of the peak, and whose."""
    if share is None or profile.peak_flops_per_s is None:
        return f"n/a ({profile.peak_flops_source})"
    return f"{share:.1%} of {format_rate(profile.peak_flops_per_s, 'FLOP')}, {profile.peak_flops_source}"


def _hfu(profile: ProfileResult) -> str:
    if profile.hfu is None:
        return "n/a"
    again = "recomputation included" if profile.flops.recompute_flops else "nothing is recomputed"
    return f"{profile.hfu:.1%}, all FLOPs that are done; {again}"


def _flops(profile: ProfileResult) -> str:
    each = [f"{look.name} {format_flops(n)}" for look in WORK if (n := getattr(profile.flops, f"{look.key}_flops"))]
    update = f"update {format_flops(profile.flops.optimizer_flops)}"
    return "a step: " + ", ".join([*each, update])


def finite_differences(profile: ProfileResult) -> str:
    """The point of backpropagation, in a sentence."""
    one = profile.finite_differences
    if one is None:
        return ""
    return (
        f"all {one.parameters_count:,} took {format_duration(one.gradients_s)}, {one.forwards:.1f} forwards;"
        f" finite differences would take {2 * one.parameters_count:,} forwards,"
        f" about {format_duration(one.finite_differences_s)}"
    )


def _model(profile: ProfileResult) -> str:
    frozen = profile.parameters_count - profile.trainable_parameters_count
    trained = f", {format_count(frozen)} of them frozen" if frozen else ""
    return f"{format_count(profile.parameters_count)} parameters{trained}"


def _set(sheet: Sheet, width: int) -> str:
    heading = [sheet.title, *sheet.headings[1:]]
    return table([heading, *sheet.rows], width=width, right=sheet.right, leave_out=sheet.leave_out, words=sheet.words)


def _some(sheet: Sheet | None, width: int) -> list[str]:
    return [_set(sheet, width)] if sheet else []


def _drawn_by(profile: ProfileResult) -> str:
    return "where the time goes" if profile.time else "where the FLOPs go"


def _without_gradients(profile: ProfileResult, width: int) -> list[str]:
    known = modules.without_gradients(profile)
    return ["modules without all of their gradients\n" + labelled(known, width)] if known else []


def _sentences(title: str, words: Iterable[str], width: int) -> str:
    return "\n".join([title, *(sentence(one, width) for one in words)])


def _next(profile: ProfileResult, given: Collection[str]) -> Sequence[str]:
    asked = shlex.join([profile.target, *profile.settings])
    gpu = f" --gpu {profile.gpu}" if profile.gpu else ""
    if profile.interrupted:
        return [f"bptool profile {asked}{gpu} --steps 3"]
    wanted = {"--html": "profile.html", "--trace": "profile.json"}
    files = [f"{option} {file}" for option, file in wanted.items() if option not in given]
    if profile.time and files:
        return [f"bptool profile {asked}{gpu} {' '.join(files)}"]
    if profile.time or profile.gpu:
        return [f"bptool memory-estimate {asked}{gpu}"]
    return [f"bptool profile {asked}"]
