"""Modules by dotted name, as the tree that they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from bptool.analysis.memory_estimate import ModuleBytes


@dataclass
class ModuleNode:
    """A module with all that is inside it.

    Attributes:
        name: the last part of its dotted name.
        parameters_bytes, activations_bytes: its own and those of the modules inside it.
    """

    name: str
    parameters_bytes: int = 0
    activations_bytes: int = 0
    children: dict[str, ModuleNode] = field(default_factory=dict)


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
    return root
