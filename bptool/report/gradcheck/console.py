"""A check of gradients as a person reads it: the verdict first, the next command last."""

from __future__ import annotations

import shlex
import textwrap
from collections import Counter

from bptool.analysis.gradcheck.result import FAILING, GradcheckResult, TensorCheck
from bptool.report.gradcheck.lesson import identities_text, precision_text
from bptool.report.gradcheck.mutations import mutations_text
from bptool.report.text import WIDTH, aligned, columns, next_commands, visible
from bptool.units import format_count, format_duration

_FOLDED = 12
"""Right tensors beyond so many are one line."""


def render(result: GradcheckResult, *, width: int = WIDTH) -> str:
    """The report, its words in lines of `width` characters."""
    blocks = [
        _headline(result),
        *([_tensors(result, width)] if _shown(result) else []),
        *([_folded(result)] if _folds(result) else []),
        _probes(result, width),
        *([identities_text(result.identities, width)] if result.identities else []),
        *([precision_text(result.precision, width)] if result.precision else []),
        *([mutations_text(result.mutations, width)] if result.mutations else []),
        aligned(cost_rows(result)),
        *([_sentences("made smaller for float64", result.sizes_cut, width)] if result.sizes_cut else []),
        *([_sentences("taken for granted, or left out", result.assumptions, width)] if result.assumptions else []),
        next_commands([_next(result)]),
        *([] if result.passed else [f"not right: {', '.join(result.failures())}"]),
    ]
    return visible("\n\n".join(blocks))


def _headline(result: GradcheckResult) -> str:
    asked = " ".join([result.target, *result.settings])
    verdicts = Counter(tensor.verdict for tensor in result.tensors)
    counted = ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in verdicts.most_common())
    answer = "no gradient is wrong" if result.passed else "not right"
    return f"{asked}: {answer} ({counted}), seed {result.seed}"


def _tensors(result: GradcheckResult, width: int) -> str:
    rows = [["tensor", "shape", "verdict", "relative error", "+-", "would have caught", ""]]
    return columns([*rows, *map(_row, _shown(result))], right=(3, 4, 5), width=width)


def _shown(result: GradcheckResult) -> list[TensorCheck]:
    """Wrong ones first; right ones last, or not at all where they are many."""
    shown = [tensor for tensor in result.tensors if tensor.verdict != "right"]
    shown.sort(key=lambda tensor: tensor.verdict not in FAILING)
    right = [tensor for tensor in result.tensors if tensor.verdict == "right"]
    return shown if _folds(result) else [*shown, *right]


def _row(tensor: TensorCheck) -> list[str]:
    figures = (tensor.relative_error, tensor.error_bar, tensor.detectable_relative_error)
    numbers = ["" if figure is None else f"{figure:.1e}" for figure in figures]
    shape = " x ".join(map(str, tensor.shape)) or "scalar"
    return [tensor.name, shape, tensor.verdict.replace("_", " "), *numbers, tensor_words(tensor)]


def tensor_words(tensor: TensorCheck) -> str:
    """Where it is wrong, what cuts its path, and the clause more."""
    where = f"at {tensor.location}" if tensor.location and tensor.location != "everywhere" else tensor.location or ""
    cut = f"cut by {tensor.cut_by}" if tensor.cut_by else ""
    return "; ".join(word for word in (where, cut, tensor.detail) if word)


def _folds(result: GradcheckResult) -> bool:
    return sum(tensor.verdict == "right" for tensor in result.tensors) > _FOLDED


def _folded(result: GradcheckResult) -> str:
    right = [tensor for tensor in result.tensors if tensor.verdict == "right"]
    seen = max((tensor.detectable_relative_error or 0.0 for tensor in right), default=0.0)
    error = max((tensor.relative_error or 0.0 for tensor in right), default=0.0)
    return (
        f"{len(right)} tensors are right: relative errors up to {error:.1e};"
        f" any error from {seen:.1e} on would have been caught"
    )


def _probes(result: GradcheckResult, width: int) -> str:
    rows = [["probe", "", ""]]
    order = sorted(result.probes, key=lambda one: one.holds)
    rows += [[one.name.replace("_", " "), "holds" if one.holds else "FAILS", one.detail] for one in order]
    return columns(rows, width=width) if result.probes else "no probe was made"


def cost_rows(result: GradcheckResult) -> list[tuple[str, str]]:
    """What backpropagation, this check and plain finite differences take; each labelled."""
    cost = result.cost
    forward, backward = format_duration(cost.forward_s), format_duration(cost.backward_s)
    plain, count = format_duration(cost.finite_differences_s), format_count(result.checked_count)
    forwards = format_count(cost.finite_differences_forwards_count)
    return [
        ("backpropagation", f"{backward}, after a forward of {forward}"),
        ("this check", f"{format_duration(cost.check_s)}: as long as {cost.passes:.0f} forwards and backwards"),
        ("finite differences", f"{plain} over all {count} numbers, {forwards} forwards"),
    ]


def _sentences(title: str, sentences: list[str], width: int) -> str:
    lines = [textwrap.fill(one, width, initial_indent="  ", subsequent_indent="    ") for one in sentences]
    return "\n".join([title, *lines])


def _next(result: GradcheckResult) -> str:
    asked = shlex.join([result.target, *result.settings])
    if result.passed:
        return f"bptool gradcheck {asked}" if ":" in result.target else f"bptool train {asked}"
    return f"bptool gradcheck {asked} --seed {result.seed}"
