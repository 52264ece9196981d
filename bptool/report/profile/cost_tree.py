"""Modules' costs as the tree that modules are; layers that are alike are one node of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from bptool.analysis.profile.result import ModuleCost
from bptool.report.module_tree import successive
from bptool.report.profile.work import WORK

Number = TypeVar("Number", int, float)
_NOTHING = (0,) * len(WORK)


@dataclass(frozen=True)
class CostNode:
    """A module with all that is inside it.

    Attributes:
        name: the last part of its dotted name; of layers that are alike `0 to 11`.
        path: the whole of it.
        flops, seconds: by kind of work, as `WORK` has them; of all that are alike together.
        timed: whether there are seconds.
        count: how many are alike.
    """

    name: str
    path: str
    type: str = ""
    status: str = ""
    calls: int = 0
    parameters_count: int = 0
    flops: tuple[int, ...] = _NOTHING
    seconds: tuple[float, ...] = _NOTHING
    timed: bool = False
    count: int = 1
    children: Sequence[CostNode] = field(default_factory=tuple)

    @property
    def weight(self) -> float:
        """What a picture of it is as wide as: seconds, or FLOPs where nothing was timed."""
        return sum(self.seconds) if self.timed else float(sum(self.flops))

    def shortened(self) -> CostNode:
        """The same, where a module that has no costs but those of a single one inside is one with it."""
        heavy = [child for child in self.children if child.weight]
        if len(heavy) == 1 and self.path and (heavy[0].flops, heavy[0].seconds) == (self.flops, self.seconds):
            return replace(heavy[0], name=f"{self.name}.{heavy[0].name}").shortened()
        return replace(self, children=tuple(child.shortened() for child in self.children))

    def untimed(self) -> CostNode:
        """The same without its seconds."""
        return replace(self, timed=False, seconds=_NOTHING, children=tuple(child.untimed() for child in self.children))


class _Place:
    """A module on the way to its node."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self.own: ModuleCost | None = None
        self.inside: dict[str, _Place] = {}


def cost_tree(modules: Iterable[ModuleCost], *, gathered: bool = True) -> CostNode:
    """The tree of modules of which each is given with what is its own; the model itself is its root.

    Args:
        gathered: layers that are alike, but for their times, are one node.
    """
    root, timed = _Place("model", ""), False
    for module in modules:
        place, path = root, ""
        for part in module.name.split(".") if module.name else ():
            path = f"{path}.{part}" if path else part
            place = place.inside.setdefault(part, _Place(part, path))
        place.own = module
        timed = timed or module.forward_s is not None
    return _node(root, timed, gathered)


def _node(place: _Place, timed: bool, gathered: bool) -> CostNode:
    children = [_node(inside, timed, gathered) for inside in place.inside.values()]
    own = place.own
    node = CostNode(
        name=place.name,
        path=place.path,
        type=own.type if own else "",
        status=own.status if own else "",
        calls=own.calls if own else 0,
        parameters_count=(own.parameters_count if own else 0) + sum(child.parameters_count for child in children),
        flops=_sums([_own_flops(own), *(child.flops for child in children)]),
        seconds=_sums([_own_seconds(own), *(child.seconds for child in children)]),
        timed=timed,
    )
    runs = successive(children, _are_alike) if gathered else [[child] for child in children]
    return replace(node, children=tuple(run[0] if len(run) == 1 else _together(run) for run in runs))


def _own_flops(module: ModuleCost | None) -> tuple[int, ...]:
    return tuple(getattr(module, f"{look.key}_flops") for look in WORK) if module else _NOTHING


def _own_seconds(module: ModuleCost | None) -> tuple[float, ...]:
    return tuple(getattr(module, f"{look.key}_s") or 0.0 for look in WORK) if module else _NOTHING


def _sums(rows: Sequence[tuple[Number, ...]]) -> tuple[Number, ...]:
    return tuple(sum(column) for column in zip(*rows, strict=True))


def _are_alike(first: CostNode, second: CostNode) -> bool:
    numbered = first.name.isdecimal() and second.name.isdecimal() and int(first.name) + 1 == int(second.name)
    return numbered and _shape(first) == _shape(second)


def _shape(node: CostNode) -> tuple[object, ...]:
    """All that is not a name or a time."""
    inside = tuple((child.name, _shape(child)) for child in node.children)
    return node.type, node.status, node.calls, node.parameters_count, node.flops, node.count, inside


def _together(run: Sequence[CostNode]) -> CostNode:
    """Nodes of the same shape as one."""
    name, path = f"{run[0].name} to {run[-1].name}", f"{run[0].path} to {run[-1].name}"
    return replace(_stacked(run, path), name=name)


def _stacked(nodes: Sequence[CostNode], path: str) -> CostNode:
    """The same part of several alike layers as one, that is called `path`."""
    parts = zip(*(node.children for node in nodes), strict=True)
    return replace(
        nodes[0],
        path=path,
        calls=sum(node.calls for node in nodes),
        parameters_count=sum(node.parameters_count for node in nodes),
        flops=_sums([node.flops for node in nodes]),
        seconds=_sums([node.seconds for node in nodes]),
        count=sum(node.count for node in nodes),
        children=tuple(_stacked(layers, f"{path}.{layers[0].name}") for layers in parts),
    )
