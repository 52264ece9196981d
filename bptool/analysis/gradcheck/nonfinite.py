"""The operation that first makes a NaN or an infinity, in a forward or in a backward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves  # pytrees have no public name yet

from bptool.analysis.gradcheck.connection import full_name
from bptool.analysis.gradcheck.nodes import nodes_from
from bptool.analysis.gradcheck.subject import Subject
from bptool.instruments.whereabouts import Whereabouts


def first_nonfinite(subject: Subject) -> str:
    """`the output is nan: first made by torch.log in blocks.0`, and what made an infinity before."""
    where = Whereabouts()
    watch = _Watch(where)
    following = nullcontext() if subject.module is None else where.following(subject.module)
    with following, watch, torch.no_grad():
        outputs = subject.outputs()
    nan = any(output.isnan().any() for output in outputs)
    found = _given(subject) or watch.words(nan=nan)
    return f"the output is {'nan' if nan else 'infinite'}" + (f": {found}" if found else "")


def _given(subject: Subject) -> str:
    """A tensor that is not finite before anything is computed; in what needs no gradient infinities are meant."""
    buffers = () if subject.module is None else subject.module.named_buffers()
    for name, leaf in subject.leaves.items():
        if not torch.isfinite(leaf.base).all():
            return f"{name} itself is not finite"
    for name, tensor in (*subject.arguments.tensors(), *buffers):
        if tensor.isnan().any():
            return f"{name} itself is nan"
    return ""


def first_nonfinite_backward(subject: Subject) -> str:
    """`first made in SqrtBackward0`: the first operation of the backward that gives what it did not get."""
    found: list[str] = []
    value = subject.scalar(subject.outputs())
    for node in nodes_from([value.grad_fn]):
        node.register_hook(partial(_after, found, node.name()))
    subject.clear()
    value.backward()
    subject.clear()
    return f"first made in {found[0]}" if found else "it is added up from finite ones"


class _Watch(TorchFunctionMode):
    """Which operation first made a NaN, and which an infinity that it was not told to make.

    Attributes:
        found: kind and operation, in the order in which they came.
    """

    def __init__(self, where: Whereabouts) -> None:
        super().__init__()
        self._where = where
        self.found: list[tuple[str, str]] = []

    def words(self, *, nan: bool) -> str:
        """`first made by torch.log in blocks.0`, and whether infinities came before; empty: by none."""
        made = self._first("nan" if nan else "infinity")
        if not made or not nan or self.found[0][0] == "nan":
            return made
        return f"{made}, after an infinity {self._first('infinity')}"

    def _first(self, kind: str) -> str:
        return next((f"first made by {operation}" for of, operation in self.found if of == kind), "")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made, given = list(_numbers(result)), list(_numbers((args, kwargs)))
        asked = any(isinstance(leaf, float) and math.isinf(leaf) for leaf in tree_leaves((args, kwargs)))
        for kind, test in (("nan", torch.isnan), ("infinity", torch.isinf)):
            known = bool(self._first(kind)) or (kind == "infinity" and asked)
            if not known and _any(made, test) and not _any(given, test):
                self.found.append((kind, self._named(func)))
        return result

    def _named(self, func: Any) -> str:
        module = self._where.module()
        return full_name(func) + (f" in {module}" if module else "")


def _any(tensors: Iterable[Tensor], test: Any) -> bool:
    return any(bool(test(tensor).any()) for tensor in tensors)


def _numbers(nest: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(nest):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf


def _after(found: list[str], name: str, made: Any, given: Any) -> None:
    if not found and _not_finite(made) and not _not_finite(given):
        found.append(name)


def _not_finite(nest: Any) -> bool:
    return any(not torch.isfinite(tensor).all() for tensor in _numbers(nest))
