"""The operation that first makes a NaN or an infinity, in a forward or in a backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves  # pytrees have no public name yet

from bptool.analysis.gradcheck.subject import Subject
from bptool.instruments.whereabouts import Whereabouts


def first_nonfinite(subject: Subject) -> str:
    """`the output is nan: first made by torch.log in blocks.0`."""
    where = Whereabouts()
    watch = _Watch(where)
    following = nullcontext() if subject.module is None else where.following(subject.module)
    with following, watch, torch.no_grad():
        outputs = subject.outputs()
    nan = any(output.isnan().any() for output in outputs)
    found = watch.first_nan if nan else watch.first_infinite
    for name, leaf in subject.leaves.items():
        if not torch.isfinite(leaf.base).all():
            found = f"{name} itself is not finite"
            break
    return f"the output is {'nan' if nan else 'infinite'}" + (f": {found}" if found else "")


def first_nonfinite_backward(subject: Subject) -> str:
    """`first made in SqrtBackward0`: the first operation of the backward that gives what it did not get."""
    found: list[str] = []
    value = subject.scalar(subject.outputs())
    for node in _nodes(value.grad_fn):
        node.register_hook(partial(_after, found, node.name()))
    subject.clear()
    value.backward()
    subject.clear()
    return f"first made in {found[0]}" if found else "it is added up from finite ones"


class _Watch(TorchFunctionMode):
    def __init__(self, where: Whereabouts) -> None:
        super().__init__()
        self._where = where
        self.first_nan = ""
        self.first_infinite = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made, given = list(_numbers(result)), list(_numbers((args, kwargs)))
        if not self.first_nan and _any(made, torch.isnan) and not _any(given, torch.isnan):
            self.first_nan = self._named(func)
        if not self.first_infinite and _any(made, torch.isinf) and not _any(given, torch.isinf):
            self.first_infinite = self._named(func)
        return result

    def _named(self, func: Any) -> str:
        name = (resolve_name(func) or getattr(func, "__name__", "an operation")).removeprefix("torch.")
        module = self._where.module()
        return f"first made by {name}" + (f" in {module}" if module else "")


def _any(tensors: Iterable[Tensor], test: Any) -> bool:
    return any(bool(test(tensor).any()) for tensor in tensors)


def _numbers(nest: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(nest):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf


def _nodes(root: Node | None) -> set[Node]:
    found: set[Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


def _after(found: list[str], name: str, made: Any, given: Any) -> None:
    if not found and _not_finite(made) and not _not_finite(given):
        found.append(name)


def _not_finite(nest: Any) -> bool:
    return any(not torch.isfinite(tensor).all() for tensor in _numbers(nest))
