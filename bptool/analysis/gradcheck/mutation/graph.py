"""The operations of a target's backward, and its gradient with one of them changed.

A target's graph is the same in each forward, so that an operation is known by its number. Each gradient takes a
forward and a backward of its own: not every operation lets one graph be used twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from bptool.analysis.gradcheck.mutation.calls import CallSite
from bptool.analysis.gradcheck.nodes import nodes_from
from bptool.analysis.gradcheck.subject import Gradients, Subject
from bptool.instruments.whereabouts import Whereabouts

_REARRANGING = (
    *("View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Expand", "Squeeze", "Unsqueeze", "Alias"),
    *("Slice", "Select", "Split", "SplitWithSizes", "Unbind", "AsStrided", "Clone", "ToCopy", "Movedim", "Unfold"),
)
"""They move numbers about; what can go wrong in them goes wrong in their neighbours, too."""


@dataclass(frozen=True)
class Site:
    """A gradient that an operation sends on.

    Attributes:
        number: of the operation, in the order in which the graph is walked.
        slot: which of its inputs the gradient is for.
        op: its name, as autograd has it.
        module: at whose work it was recorded.
    """

    number: int
    slot: int
    op: str
    module: str
    shape: tuple[int, ...]

    @property
    def words(self) -> str:
        """`MmBackward0[1]`."""
        return f"{self.op}[{self.slot}]"


Place = TypeVar("Place", Site, CallSite)


def sites(subject: Subject) -> list[Site]:
    """Every gradient that an operation of the target sends on, from the outputs to the leaves."""
    where, found = Whereabouts(), list[Site]()

    def note(number: int, op: str, module: str, given: Any, _: Any) -> None:
        for slot, gradient in enumerate(given):
            if isinstance(gradient, Tensor) and gradient.numel():
                found.append(Site(number, slot, op, module, tuple(gradient.shape)))

    with nullcontext() if subject.module is None else where.following(subject.module):
        outputs = subject.outputs()
    for number, node in enumerate(nodes_from([output.grad_fn for output in outputs])):
        if not node.name().endswith("AccumulateGrad"):
            module = where.recorded_by(node._sequence_nr())
            node.register_hook(partial(note, number, node.name(), module))
    _backward(subject, outputs)
    working = [site for site in found if not _rearranges(site.op)]
    return sorted(working or found, key=lambda site: (site.number, site.slot))


def gradients_with(subject: Subject, site: Site, change: Callable[[Tensor], Tensor]) -> Gradients:
    """The leaves' gradients where the operation's gradient is changed on its way."""
    outputs = subject.outputs()

    def hook(given: Any, _: Any) -> Any:
        wrong = list(given)
        if isinstance(wrong[site.slot], Tensor):
            right = wrong[site.slot]
            wrong[site.slot] = torch.empty_like(right).copy_(change(right))  # it lies in memory as the right one does
        return tuple(wrong)

    _node(outputs, site).register_hook(hook)
    return _backward(subject, outputs)


def sent_at(subject: Subject, site: Site, direction: Mapping[str, Tensor]) -> Tensor | None:
    """The gradient that the operation sends on where the leaves are at another point."""
    found: list[Tensor] = []
    with subject.along(direction) as go:
        go(1.0)
        outputs = subject.outputs()
        _node(outputs, site).register_hook(lambda given, _: found.append(given[site.slot]))
        _backward(subject, outputs)
    return found[0].clone() if found and isinstance(found[0], Tensor) else None


def spread(found: Sequence[Place], used: Counter[str], generator: torch.Generator) -> list[Place]:
    """Places in random order, of those operations first that were used least."""
    order = torch.randperm(len(found), generator=generator).tolist()
    return sorted((found[i] for i in order), key=lambda place: used[place.op])


def _node(outputs: list[Tensor], site: Site) -> Node:
    node = list(nodes_from([output.grad_fn for output in outputs]))[site.number]
    assert node.name() == site.op, "a deterministic target records the same graph each time"
    return node


def _backward(subject: Subject, outputs: list[Tensor]) -> Gradients:
    subject.clear()
    subject.scalar(outputs).backward()
    return subject.collected()


def _rearranges(op: str) -> bool:
    return op.rstrip("0123456789").removesuffix("Backward") in _REARRANGING
