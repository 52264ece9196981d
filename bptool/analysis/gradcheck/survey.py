"""What one forward shows of a target before anything is measured: its precision, and what is left out on purpose."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves  # pytrees have no public name yet

from bptool.analysis.gradcheck.connection import full_name
from bptool.analysis.gradcheck.differences import EPSILON
from bptool.analysis.gradcheck.subject import Subject
from bptool.instruments.whereabouts import Whereabouts

_EMBEDDINGS = (F.embedding, F.embedding_bag)


@dataclass(frozen=True)
class Survey:
    """What a forward showed.

    Attributes:
        epsilon: relative precision of the coarsest number format that a checked tensor's values pass through.
        sentences: what is left out, and why.
    """

    epsilon: float
    sentences: list[str]


def survey(subject: Subject) -> Survey:
    """Watch one forward; rows that an embedding's `padding_idx` excludes are marked in the leaves."""
    where = Whereabouts()
    watch = _Watch(where)
    following = nullcontext() if subject.module is None else where.following(subject.module)
    with following, watch, torch.enable_grad():
        subject.outputs()
    sentences = []
    for name, leaf in subject.leaves.items():
        rows = watch.padding.get(id(leaf.tensor))
        if rows:
            leaf.kept = torch.ones_like(leaf.base)
            leaf.kept[sorted(rows)] = 0
            numbers = ", ".join(map(str, sorted(rows)))
            sentences.append(f"{name}: row {numbers} is left out: padding_idx defines that it gets no gradient")
    weights = subject.output_weights()
    skipped = sum(weight is None for weight in weights)
    if skipped:
        sentences.append(f"{skipped} of {len(weights)} outputs left out: autograd has no path to them")
    if watch.epsilon > EPSILON:
        sentences.append(f"the forward computes in {watch.coarsest} on, so the differences are coarse")
    return Survey(watch.epsilon, sentences)


class _Watch(TorchFunctionMode):
    """Follows what depends on tensors that require a gradient.

    Attributes:
        padding: rows that an embedding leaves out, by the id of its weight.
    """

    def __init__(self, where: Whereabouts) -> None:
        super().__init__()
        self._where = where
        self.epsilon = EPSILON
        self.coarsest = ""
        self.padding: dict[int, set[int]] = {}
        self._dependent: dict[int, Tensor] = {}  # held: an id names a tensor only while it lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _EMBEDDINGS:
            self._note_padding(func, args, kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.requires_grad or id(tensor) in self._dependent for tensor in given):
            for made in tree_leaves(result):
                if isinstance(made, Tensor) and (made.is_floating_point() or made.is_complex()):
                    self._note_precision(made, func)
        return result

    def _note_padding(self, func: Any, args: Any, kwargs: Any) -> None:
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        weight, row = given["weight"], given.get("padding_idx")
        if row is not None:
            self.padding.setdefault(id(weight), set()).add(row % len(weight))

    def _note_precision(self, made: Tensor, func: Any) -> None:
        self._dependent[id(made)] = made
        epsilon = torch.finfo(made.dtype).eps
        if epsilon > self.epsilon:
            module, dtype = self._where.module(), str(made.dtype).removeprefix("torch.")
            self.epsilon, self.coarsest = epsilon, f"{dtype} from {full_name(func)}{f' in {module}' if module else ''}"
