"""Dotted names as a tree, by hand."""

from __future__ import annotations

from bptool.analysis.memory.result import ModuleBytes
from bptool.report.module_tree import ModuleNode, module_tree


def of(figures: dict[str, tuple[int, int]]) -> ModuleNode:
    return module_tree(
        ModuleBytes(name=name, parameters_bytes=p, activations_bytes=a) for name, (p, a) in figures.items()
    )


def test_sums_go_up_and_order_stays() -> None:
    root = of({"b.y": (1, 10), "": (100, 0), "b.x.z": (2, 20), "a": (4, 40), "b": (8, 80)})
    z = ModuleNode("z", 2, 20)
    b = ModuleNode("b", 11, 110, {"y": ModuleNode("y", 1, 10), "x": ModuleNode("x", 2, 20, {"z": z})})
    assert root == ModuleNode("model", 115, 150, {"b": b, "a": ModuleNode("a", 4, 40)})
    assert list(root.children) == ["b", "a"]


def test_layers_that_are_alike_are_one() -> None:
    """The last block holds more; the experts inside it are alike too."""
    layers = {
        f"blocks.{i}.{name}": (i // 9 + 2, 5) for i in range(8, 11) for name in ("experts.0", "experts.1", "norm")
    }
    blocks = of(layers).children["blocks"]
    assert list(blocks.children) == ["8", "9 to 10"]

    def experts(n: int, parameters: int) -> ModuleNode:
        both = ModuleNode("0 to 1", 2 * n * parameters, 2 * n * 5, {}, 2 * n)
        return ModuleNode("experts", 2 * n * parameters, 2 * n * 5, {"0 to 1": both}, n)

    def block(name: str, n: int, parameters: int) -> ModuleNode:
        children = {"experts": experts(n, parameters), "norm": ModuleNode("norm", n * parameters, n * 5, {}, n)}
        return ModuleNode(name, 3 * n * parameters, 3 * n * 5, children, n)

    assert blocks.children["8"] == block("8", 1, 2)
    assert blocks.children["9 to 10"] == block("9 to 10", 2, 3)


def test_only_neighbours_by_number_are_gathered() -> None:
    for names in (("0", "2"), ("a", "b"), ("1", "0"), ("norm1", "norm2")):
        assert list(of(dict.fromkeys(names, (1, 1))).children) == list(names)
    assert list(of({"0": (1, 1), "1": (1, 2)}).children) == ["0", "1"]
    assert list(of({"0.a": (1, 1), "1.b": (1, 1)}).children) == ["0", "1"]
