"""Modules' costs as a tree, by hand."""

from __future__ import annotations

from typing import Any

from profile_records import deep_profile, small_profile

from bptool.analysis.profile.result import ModuleCost
from bptool.report.profile.cost_tree import CostNode, cost_tree


def module(name: str, flops: int, seconds: float | None = None, **changes: Any) -> ModuleCost:
    return ModuleCost(
        **{
            **{"name": name, "type": "Linear", "calls": 1, "parameters_count": 3, "bytes_moved": 1, "status": "used"},
            **{"forward_flops": flops, "dgrad_flops": 2 * flops, "wgrad_flops": flops, "recompute_flops": 0},
            **{"forward_s": seconds, "dgrad_s": seconds, "wgrad_s": seconds, "recompute_s": seconds},
            **changes,
        }
    )


def names(node: CostNode) -> list[str]:
    return [child.name for child in node.children]


def test_sums_go_up() -> None:
    root = cost_tree([module("b.y", 10, 1.0), module("", 100, 0.5), module("b", 1, 0.25)])
    (b,) = root.children
    assert (root.flops, root.seconds) == ((111, 222, 111, 0), (1.75,) * 4)
    assert (b.flops, b.path, b.calls) == ((11, 22, 11, 0), "b", 1)
    assert (root.parameters_count, root.weight, root.untimed().weight) == (9, 7.0, 444.0)
    assert root.untimed().children[0].seconds == (0,) * 4


def test_layers_alike_but_for_their_times_are_one() -> None:
    layers = [module(f"blocks.{i}.{part}", 10 + (i == 0), i / 8) for i in range(5) for part in ("up", "down")]
    (blocks,) = cost_tree(layers).children
    assert names(blocks) == ["0", "1 to 4"]
    alike = blocks.children[1]
    assert (alike.count, alike.path, names(alike)) == (4, "blocks.1 to 4", ["up", "down"])
    up = alike.children[0]
    assert (up.path, up.flops[0], up.seconds[0], up.calls) == ("blocks.1 to 4.up", 40, (1 + 2 + 3 + 4) / 8, 4)
    (blocks,) = cost_tree(layers, gathered=False).children
    assert names(blocks) == ["0", "1", "2", "3", "4"]


def test_others_are_not() -> None:
    for changes in ({"status": "frozen"}, {"type": "Conv"}, {"calls": 2}, {"parameters_count": 4}):
        assert names(cost_tree([module("0", 1), module("1", 1, **changes)])) == ["0", "1"]
    assert names(cost_tree([module("0", 1), module("2", 1)])) == ["0", "2"]
    assert names(cost_tree([module("a", 1), module("b", 1)])) == ["a", "b"]


def test_a_module_around_a_single_one_is_one_with_it() -> None:
    root = cost_tree([module("a.b.c", 1), module("a.b.d", 2), module("e", 1), module("a.unused", 0)]).shortened()
    assert names(root) == ["a.b", "e"]
    assert names(root.children[0]) == ["c", "d"]
    only = cost_tree([module("a", 1)]).shortened()
    assert (only.name, names(only)) == ("model", ["a"])


def test_of_whole_models_nothing_is_lost() -> None:
    for profile in (small_profile(), deep_profile()):
        root = cost_tree(profile.modules)
        assert root.flops == tuple(sum(getattr(m, f"{k}_flops") for m in profile.modules) for k in KINDS)
        assert root.parameters_count == profile.parameters_count
        assert root.timed == (profile.time is not None)
        (blocks,) = (child for child in root.children if child.name == "blocks")
        assert len(blocks.children) == 1


KINDS = ("forward", "dgrad", "wgrad", "recompute")
