"""Modules by dotted name, as the tree that they are; layers that are alike are one row of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from bptool.analysis.memory.result import ModuleBytes

T = TypeVar("T")


@dataclass
class ModuleNode:
    """A module with all that is inside it.

    Attributes:
        name: the last part of its dotted name; of layers that are alike `0 to 11`.
        parameters_bytes, activations_bytes: its own and those of the modules inside it, of all that are alike together.
        count: how many are alike.
    """

    name: str
    parameters_bytes: int = 0
    activations_bytes: int = 0
    children: dict[str, ModuleNode] = field(default_factory=dict)
    count: int = 1


def module_tree(modules: Iterable[ModuleBytes]) -> ModuleNode:
    """The tree of modules of which each is given with what is its own; the model itself has no name."""
    root = ModuleNode("model")
    for module in modules:
        node = root
        for part in [None, *module.name.split(".")] if module.name else [None]:
            if part is not None:
                node = node.children.setdefault(part, ModuleNode(part))
            node.parameters_bytes += module.parameters_bytes
            node.activations_bytes += module.activations_bytes
    return _gathered(root)


def successive(items: Iterable[T], are_alike: Callable[[T, T], bool]) -> list[list[T]]:
    """The items in runs of neighbours that are alike."""
    runs: list[list[T]] = []
    for item in items:
        if runs and are_alike(runs[-1][-1], item):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def _gathered(node: ModuleNode) -> ModuleNode:
    """The same, with numbered neighbours of the same figures, inside too, as one."""
    children = [_gathered(child) for child in node.children.values()]
    together = [run[0] if len(run) == 1 else _together(run) for run in successive(children, _are_alike)]
    return replace(node, children={child.name: child for child in together})


def _are_alike(first: ModuleNode, second: ModuleNode) -> bool:
    numbered = first.name.isdecimal() and second.name.isdecimal() and int(first.name) + 1 == int(second.name)
    return numbered and replace(first, name=second.name) == second


def _together(group: list[ModuleNode]) -> ModuleNode:
    return replace(_times(group[0], len(group)), name=f"{group[0].name} to {group[-1].name}")


def _times(node: ModuleNode, count: int) -> ModuleNode:
    return ModuleNode(
        node.name,
        node.parameters_bytes * count,
        node.activations_bytes * count,
        {name: _times(child, count) for name, child in node.children.items()},
        node.count * count,
    )
