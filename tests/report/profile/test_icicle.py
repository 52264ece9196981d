"""The icicle in a terminal: widths are shares."""

from __future__ import annotations

import pytest
from profile_records import HOSTILE, deep_profile, hostile_profile, small_profile
from rich.cells import cell_len

from bptool.report.profile.cost_tree import CostNode, cost_tree
from bptool.report.profile.icicle import icicle

ROOT = CostNode(
    "model",
    "",
    flops=(20, 20, 0, 0),
    children=(
        CostNode("a", "a", flops=(20, 0, 0, 0), children=(CostNode("inner", "a.inner", flops=(10, 0, 0, 0)),)),
        CostNode("long_name", "long_name", flops=(0, 10, 0, 0)),
    ),
)


def test_by_hand() -> None:
    """40 FLOPs on 40 characters, the last of a bar left free; a quarter of the model is its own."""
    assert icicle(ROOT, width=40).plain.split("\n") == [
        "model 100%",
        "████████████████████▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓",
        "a 50%               long_name",
        "███████████████████ ▓▓▓▓▓▓▓▓▓",
        "inner 25%",
        "█████████",
        "█ forward 50%   ▓ dgrad 50%",
        "",
    ]


def test_depth_and_nothing_to_draw() -> None:
    assert "inner" not in icicle(ROOT, width=40, depth=2).plain
    assert icicle(CostNode("model", ""), width=40).plain == ""


@pytest.mark.parametrize("width", [40, 57, 80, 200])
@pytest.mark.parametrize("colored", [False, True])
def test_it_keeps_to_its_width(width: int, colored: bool) -> None:
    for profile in (small_profile(), deep_profile(), hostile_profile()):
        lines = icicle(cost_tree(profile.modules), width=width, colored=colored).plain.split("\n")
        assert max(map(cell_len, lines)) <= width
        assert len(lines[1]) >= width - 2


def test_colours_say_the_same_as_shades() -> None:
    root = cost_tree(small_profile().modules)
    plain, colored = (icicle(root, width=90, colored=c) for c in (False, True))
    assert plain.plain.translate(str.maketrans("▓▒░", "███")) == colored.plain
    assert not plain.spans
    assert {str(span.style) for span in colored.spans} == {"#2f6fb3", "#e8a33d", "#cf6fa2", "#23a27d"}


def test_names_are_those_of_the_user() -> None:
    assert HOSTILE[:20] in icicle(cost_tree(hostile_profile().modules), width=200).plain
