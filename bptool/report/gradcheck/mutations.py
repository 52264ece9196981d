"""Known bugs that were put into a target's backward, as text: those that went by first."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from bptool.analysis.gradcheck.mutation.record import MutationCheck
from bptool.report.text import WIDTH, columns

_ORDER = ("missed", "caught", "no_effect")


def mutations_text(found: Sequence[MutationCheck], width: int = WIDTH) -> str:
    """How many were caught, then each with the error that it made; what does not apply is one paragraph."""
    made = sorted((one for one in found if one.outcome in _ORDER), key=lambda one: _ORDER.index(one.outcome))
    table = columns([["a bug in its own backward", "", "error", "where"], *map(_row, made)], right=(2,), width=width)
    return "\n".join(
        [
            f"mutations: {summary(found)}",
            *([table] if made else []),
            *(_wrapped(one, width) for one in not_applicable(found)),
        ]
    )


def summary(found: Sequence[MutationCheck]) -> str:
    """`of 61 known bugs that change the gradient the check catches 60`."""
    counts = Counter(one.outcome for one in found)
    changing = counts["caught"] + counts["missed"]
    others = []
    if counts["no_effect"]:
        others.append(f"{counts['no_effect']} change nothing here")
    if counts["not_applicable"]:
        others.append(f"{counts['not_applicable']} do not apply")
    rest = f" ({', '.join(others)})" if others else ""
    return f"of {changing} known bugs that change the gradient the check catches {counts['caught']}{rest}"


def _row(one: MutationCheck) -> list[str]:
    error = "" if one.relative_error is None else f"{one.relative_error:.1e}"
    where = f"{one.op} in {one.module}" if one.module else one.op
    words = "" if one.outcome == "caught" and one.relative_error is not None else one.detail
    return [one.name, one.outcome.replace("_", " "), error, "; ".join(filter(None, [where, words]))]


def not_applicable(found: Sequence[MutationCheck]) -> list[str]:
    """The functions that are not called, by name; any other reason with the bugs that it holds for."""
    left = [one for one in found if one.outcome == "not_applicable"]
    absent = [one for one in left if one.detail.endswith("not called")]
    sentences = []
    if absent:
        functions = ", ".join(dict.fromkeys(op for one in absent for op in one.op.split(" or ")))
        sentences.append(f"not applicable: {len(absent)} bugs of functions that it does not call ({functions})")
    for reason in dict.fromkeys(one.detail for one in left if one not in absent):
        sentences.append(f"not applicable: {', '.join(one.name for one in left if one.detail == reason)}: {reason}")
    return sentences


def _wrapped(sentence: str, width: int) -> str:
    return textwrap.fill(sentence, width, initial_indent="  ", subsequent_indent="    ")
