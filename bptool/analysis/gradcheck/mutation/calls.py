"""The functions that a target calls, and its gradient where one of them has the derivative of another.

The function's value stays what it is, so that only the backward is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves  # pytrees have no public name yet

from bptool.analysis.gradcheck.connection import function_at_work, plain_name
from bptool.analysis.gradcheck.random_state import random_state_kept
from bptool.analysis.gradcheck.subject import Gradients, Subject
from bptool.instruments.whereabouts import Whereabouts


@dataclass(frozen=True)
class Call:
    """A call as it was made.

    Attributes:
        function: PyTorch's.
        right: what it returned, without a graph.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    right: Tensor

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, given by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


Formula = Callable[[Call], Tensor | None]
"""A tensor with the wrong derivative, of the shape that the call returned; None: it says nothing of such a call."""


@dataclass(frozen=True)
class CallSite:
    """A call in a target's forward.

    Attributes:
        number: among the calls of functions of that name.
        module: at whose work it was made.
    """

    op: str
    number: int
    module: str


class DoesNotApplyError(Exception):
    """The formula says nothing of this call."""


def call_sites(subject: Subject, names: set[str]) -> list[CallSite]:
    """The calls of functions of these names through which a gradient flows."""
    where = Whereabouts()
    watch = _Watch(names, where)
    with nullcontext() if subject.module is None else where.following(subject.module), torch.enable_grad(), watch:
        subject.outputs()
    return watch.found


def gradients_with_formula(subject: Subject, site: CallSite, formula: Formula) -> Gradients:
    """The leaves' gradients where the call's derivative is the formula's.

    Raises:
        DoesNotApplyError: the formula says nothing of this call.
    """
    with Exchange(site, formula):
        outputs = subject.outputs()
    subject.clear()
    subject.scalar(outputs).backward()
    return subject.collected()


class _Counting(TorchFunctionMode):
    """Counts the calls of some functions, those that record a graph alone."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names = names
        self._counts: dict[str, int] = {}

    def number(self, func: Any, args: Any, kwargs: Any) -> int | None:
        """Of this call, among those of its name; None: it is another's, or no gradient flows through it."""
        name = plain_name(func)
        if name not in self._names or not torch.is_grad_enabled() or function_at_work():
            return None
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))):
            return None
        self._counts[name] = self._counts.get(name, 0) + 1
        return self._counts[name] - 1


class _Watch(_Counting):
    def __init__(self, names: set[str], where: Whereabouts) -> None:
        super().__init__(names)
        self._where = where
        self.found: list[CallSite] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = self.number(func, args, kwargs or {})
        if number is not None:
            self.found.append(CallSite(plain_name(func), number, self._where.module() or ""))
        return func(*args, **(kwargs or {}))


class Exchange(_Counting):
    """While it is entered, one call has its own value and a formula's derivative."""

    def __init__(self, site: CallSite, formula: Formula) -> None:
        super().__init__({site.op})
        self._site = site
        self._formula = formula

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.number(func, args, kwargs) != self._site.number:
            return func(*args, **kwargs)
        given = [(leaf, leaf._version) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        right = func(*args, **kwargs)
        if not isinstance(right, Tensor) or any(tensor._version != version for tensor, version in given):
            raise DoesNotApplyError  # it works in place: its inputs are gone
        with random_state_kept():  # what follows draws what it would have drawn
            wrong = _tried(self._formula, Call(func, args, kwargs, right.detach()))
        if wrong is None or wrong.shape != right.shape or wrong.dtype != right.dtype or not wrong.requires_grad:
            raise DoesNotApplyError
        return _ValueOfOneSlopeOfOther.apply(right.detach(), wrong)  # type: ignore[no-untyped-call]


def _tried(formula: Formula, call: Call) -> Tensor | None:
    """A function has ways to be called that a formula does not know."""
    try:
        return formula(call)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None


class _ValueOfOneSlopeOfOther(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad
