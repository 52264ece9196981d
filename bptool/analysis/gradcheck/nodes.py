"""Autograd's graph of what a target gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.autograd.graph import Node


def nodes_from(ends: Sequence[Node | None]) -> Iterator[Node]:
    """Every node that a gradient can reach from some, depth first, in an order that the graph alone decides."""
    known: set[Node] = set()
    waiting = list(reversed(ends))
    while waiting:
        node = waiting.pop()
        if node is not None and node not in known:
            known.add(node)
            yield node
            waiting += [following for following, _ in reversed(node.next_functions)]
