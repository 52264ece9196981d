"""A check of gradients as a page: the answer, each tensor, the lesson, probes, known bugs and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from bptool.analysis.gradcheck.mutation.record import MutationCheck
from bptool.analysis.gradcheck.precision import PrecisionCheck
from bptool.analysis.gradcheck.result import FAILING, GradcheckResult, TensorCheck
from bptool.report.gradcheck.console import cost_rows, tensor_words
from bptool.report.gradcheck.lesson_page import lesson
from bptool.report.gradcheck.mutations import not_applicable, summary
from bptool.report.html.elements import element, styled
from bptool.report.html.page import page, section
from bptool.report.html.parts import Column, Piece, Tile, bullets, command_line, meter, table, tiles
from bptool.units import format_count, format_duration


def render_page(result: GradcheckResult, *, command: str) -> str:
    """The page as one HTML document.

    Args:
        command: the command line that made it.
    """
    body = [
        _answer(result),
        tiles(_tiles(result)),
        section("Tensor by tensor", _tensors(result.tensors)),
        *(lesson(result.identities) if result.identities else []),
        *([section("What else was tried", _probes(result))] if result.probes else []),
        *([_mutations(result.mutations)] if result.mutations else []),
        *([_precision(result.precision)] if result.precision else []),
        section("What it cost", _cost_bar(result), table([Column(""), Column("", "words")], cost_rows(result))),
        *([section("Made smaller for float64", bullets(result.sizes_cut))] if result.sizes_cut else []),
        *([section("Left out", bullets(result.assumptions))] if result.assumptions else []),
        section("Again, in the same directions", command_line(_again(command, result.seed))),
    ]
    title = " ".join([result.target, *result.settings])
    return page(result.command, title, f"every gradient against finite differences, seed {result.seed}", body)


def _answer(result: GradcheckResult) -> Element:
    counts = Counter(tensor.verdict for tensor in result.tensors)
    if result.passed:
        words, kind = "No gradient is wrong.", "yes"
    else:
        words, kind = f"Not right: {', '.join(result.failures())}.", "no"
    shares = [
        Piece(f"{count} {verdict.replace('_', ' ')}", count, _COLOURS.get(verdict, "c-reserved"))
        for verdict, count in counts.most_common()
    ]
    return styled("div", f"answer {kind}", styled("p", "verdict", words), meter(shares, None, ""))


_COLOURS = {
    "right": "c-activations",
    "wrong": "c-wgrad",
    "nondeterministic": "c-wgrad",
    "kink": "c-dgrad",
    "estimator": "c-update",
    "structurally_zero": "c-data",
    "not_connected": "c-clip",
}


def _tiles(result: GradcheckResult) -> list[Tile]:
    right = [tensor for tensor in result.tensors if tensor.verdict == "right"]
    error = max((tensor.relative_error or 0.0 for tensor in right), default=0.0)
    seen = max((tensor.detectable_relative_error or 0.0 for tensor in right), default=0.0)
    found = [
        Tile("right", f"{len(right)} of {len(result.tensors)}", f"{format_count(result.checked_count)} numbers"),
        Tile("would have caught", f"{seen:.1e}", f"and from there on; they are off by up to {error:.1e}"),
    ]
    if result.identities:
        holding = sum(identity.holds for identity in result.identities)
        found.append(Tile("identities", f"{holding} of {len(result.identities)}", "hold"))
    if result.mutations:
        counts = Counter(one.outcome for one in result.mutations)
        changing = counts["caught"] + counts["missed"]
        found.append(Tile("known bugs caught", f"{counts['caught']} of {changing}", "in the target's own backward"))
    passes = f"{result.cost.passes:.0f} forwards and backwards"
    return [*found, Tile("this check", format_duration(result.cost.check_s), passes)]


def _tensors(tensors: Sequence[TensorCheck]) -> Element:
    """Wrong ones first."""
    ordered = sorted(tensors, key=lambda tensor: (tensor.verdict not in FAILING, tensor.verdict == "right"))
    columns = [
        Column("tensor"),
        Column("shape", "aside"),
        Column("verdict"),
        Column("relative error", "number"),
        Column("\u00b1", "aside number"),
        Column("would have caught", "number"),
        Column("", "words"),
    ]
    rows = [_tensor(tensor) for tensor in ordered]
    told = len(columns) if any(row[-1] for row in rows) else -1  # words that are none would take the most room
    return table(columns[:told], [row[:told] for row in rows])


def _tensor(tensor: TensorCheck) -> list[Element | str]:
    figures = (tensor.relative_error, tensor.error_bar, tensor.detectable_relative_error)
    shape = " \u00d7 ".join(map(str, tensor.shape)) or "scalar"
    failing = tensor.verdict in FAILING
    verdict = element("span", {"class": "mark-no"} if failing else None, tensor.verdict.replace("_", " "))
    return [_unbroken(tensor.name), shape, verdict, *map(_figure, figures), tensor_words(tensor)]


def _unbroken(name: str) -> Element:
    return styled("code", "unbroken", name)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _probes(result: GradcheckResult) -> Element:
    rows: list[list[Element | str]] = []
    for probe in sorted(result.probes, key=lambda one: one.holds):
        mark = element("span", None if probe.holds else {"class": "mark-no"}, "holds" if probe.holds else "fails")
        rows.append([probe.name.replace("_", " "), mark, probe.detail])
    return table([Column("probe"), Column(""), Column("", "words")], rows)


def _mutations(found: Sequence[MutationCheck]) -> Element:
    order = ("missed", "caught", "no_effect")
    made = sorted((one for one in found if one.outcome in order), key=lambda one: order.index(one.outcome))
    rows: list[list[Element | str]] = []
    for one in made:
        where = element("span", None, element("code", None, one.op), f" in {one.module}" if one.module else "")
        mark = element("span", {"class": "mark-no"} if one.outcome == "missed" else None, one.outcome.replace("_", " "))
        rows.append([one.name, mark, _figure(one.relative_error), where, element("span", None, *_most_in(one))])
    columns = [
        Column("bug"),
        Column(""),
        Column("error", "number"),
        Column("in whose backward"),
        Column("most in", "aside"),
    ]
    lead = f"Known bugs, each put into one operation of the target's own backward: {summary(found)}."
    return section(
        "Would it have caught a bug?", styled("p", "lead", lead), table(columns, rows), bullets(not_applicable(found))
    )


def _most_in(one: MutationCheck) -> list[Element | str]:
    return [element("code", None, one.tensor), f" {one.detail}"] if one.tensor else [one.detail]


def _precision(check: PrecisionCheck) -> Element:
    columns = [
        Column(f"{check.mode} beside float64"),
        Column("relative error", "number"),
        Column("cosine", "number"),
        Column("underflow", "number"),
    ]
    rows: list[list[Element | str]] = [
        [
            _unbroken(one.name),
            _figure(one.relative_error),
            "" if one.cosine is None else f"{one.cosine:.6f}",
            f"{one.underflow_share:.2%}" if one.underflow_share else "none",
        ]
        for one in check.tensors
    ]
    lead = styled("p", "lead", check.detail)
    return section("What the number format loses", lead, table(columns, rows), bullets(check.notes))


def _cost_bar(result: GradcheckResult) -> Element:
    cost = result.cost
    parts = {
        "identities": (cost.identities_s, "c-activations"),
        "precision": (cost.precision_s, "c-update"),
        "known bugs": (cost.mutations_s, "c-wgrad"),
    }
    rest = cost.check_s - sum(seconds for seconds, _ in parts.values())
    amounts = {"differences and probes": (rest, "c-forward")} | parts
    pieces = [
        Piece(f"{words} {format_duration(seconds)}", seconds / cost.check_s, kind)
        for words, (seconds, kind) in amounts.items()
        if seconds
    ]
    return meter(pieces, None, "")


def _again(command: str, seed: int) -> str:
    return command if "--seed" in command else f"{command} --seed {seed}"
