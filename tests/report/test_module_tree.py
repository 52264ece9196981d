"""Dotted names as a tree, by hand."""

from __future__ import annotations

from bptool.analysis.memory_estimate import ModuleBytes
from bptool.report.module_tree import ModuleNode, module_tree


def test_sums_go_up_and_order_stays() -> None:
    given = [("b.y", 1, 10), ("", 100, 0), ("b.x.z", 2, 20), ("a", 4, 40), ("b", 8, 80)]
    root = module_tree(ModuleBytes(name=name, parameters_bytes=p, activations_bytes=a) for name, p, a in given)
    z = ModuleNode("z", 2, 20)
    b = ModuleNode("b", 11, 110, {"y": ModuleNode("y", 1, 10), "x": ModuleNode("x", 2, 20, {"z": z})})
    assert root == ModuleNode("model", 115, 150, {"b": b, "a": ModuleNode("a", 4, 40)})
    assert list(root.children) == ["b", "a"]
