"""A profile's tables of modules, as the terminal and the page both show them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bptool.analysis.profile.result import ModuleCost, ProfileResult
from bptool.report.profile.cost_tree import CostNode, cost_tree
from bptool.report.profile.sheets import Sheet
from bptool.report.profile.work import WORK
from bptool.report.scale import FLOP_UNITS, SECOND_UNITS, Scale, scale_of

_STATUSES = {
    "unused": "never called",
    "no_backward": "no gradient comes back through",
    "frozen": "frozen, a gradient passes through",
}
_MOST_NAMES = 12


def by_kind_of_work(profile: ProfileResult, depth: int) -> list[Sheet]:
    """The tree of modules by FLOPs and, where a step was timed, by time, to so many levels below the model."""
    root = cost_tree(profile.modules).shortened()
    flops = scale_of(sum(root.flops), FLOP_UNITS)
    found = [_sheet(f"{flops.unit} by module", _rows(root, False, flops, depth))]
    if root.timed:
        time = scale_of(sum(root.seconds), SECOND_UNITS)
        found.append(
            _sheet(f"{time.unit} by module", [*_rows(root, True, time, depth), *_residual(profile, root, time)])
        )
    return found


def _sheet(title: str, rows: Sequence[Sequence[str]]) -> Sheet:
    headings = ["", *(look.name for look in WORK), "all", "share"]
    return Sheet(title, headings, rows, right=range(1, 7), leave_out=[(6,), range(1, 5)])


def _rows(root: CostNode, timed: bool, scale: Scale, most: int) -> list[list[str]]:
    """The tree, line by line; a kind of work that no module does has no figures."""
    totals = _amounts(root, timed)
    found: list[list[str]] = []

    def add(node: CostNode, depth: int) -> None:
        amounts = _amounts(node, timed)
        cells = [scale.text(amount) if total else "" for amount, total in zip(amounts, totals, strict=True)]
        share = f"{sum(amounts) / (sum(totals) or 1):.1%}"
        found.append(["  " * depth + node.name, *cells, scale.text(sum(amounts)), share])
        for child in node.children if depth < most else ():
            if child.weight or sum(child.flops) or child.parameters_count:  # else it is nothing, as an unused dropout
                add(child, depth + 1)

    add(root, 0)
    return found


def _amounts(node: CostNode, timed: bool) -> tuple[float, ...]:
    return node.seconds if timed else node.flops


def _residual(profile: ProfileResult, root: CostNode, scale: Scale) -> list[list[str]]:
    """What lies between the modules' times and the phases as they were measured."""
    recorded = sum(one.operations_s + one.outside_s for one in profile.unexplained)
    rest = sum(one.unexplained_s for one in profile.unexplained)
    measured = sum(one.measured_s for one in profile.unexplained)
    lines = [
        ("outside of the modules", recorded - sum(root.seconds)),
        ("unexplained residual", rest),
        ("as measured", measured),
    ]
    return [[name, *[""] * len(WORK), scale.text(seconds), ""] for name, seconds in lines if profile.unexplained]


def without_gradients(profile: ProfileResult) -> list[tuple[str, str]]:
    """Modules that have parameters of their own, and for some reason no gradient of these."""
    found = [
        (words, _names(module for module in profile.modules if module.status == status and module.parameters_count))
        for status, words in _STATUSES.items()
    ]
    return [(words, names) for words, names in found if names]


def _names(modules: Iterable[ModuleCost]) -> str:
    names = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", module.name) for module in modules))
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
