"""Whether a path leads from a tensor to the outputs, and the operation that cuts it where none does.

The function runs once more with that tensor alone requiring a gradient. Then `requires_grad` says of every value
whether autograd knows a path to it, and where a value depends on the tensor without one, the operation that made it is
the cut. Inside an `autograd.Function` nothing is judged: its backward stands for what it does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves  # pytrees have no public name yet

from bptool.analysis.gradcheck.subject import Leaf, Subject

_ZERO_BY_DEFINITION = {
    *("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "floor_divide", "floordiv", "rfloordiv", "heaviside"),
    *("bernoulli", "poisson", "normal", "nextafter"),
}
_SAMPLING = {"multinomial", "bernoulli", "poisson", "binomial", "normal", "randperm"}
_ON_PURPOSE = ("detach", "no_grad", "inference_mode", "round", "floor", "ceil", "trunc", "sign", "sampling")
_CASTS = {"long", "int", "short", "char", "byte", "bool", "to", "type", "type_as"}
_SHOWN_AS = {"data": "detach (.data)", "floordiv": "floor_divide (//)", "rfloordiv": "floor_divide (//)"}
_TO_PYTHON = {"item", "tolist", "numpy", "float", "int", "bool", "index", "array"}


@dataclass(frozen=True)
class Connection:
    """What leads from a tensor to the outputs.

    Attributes:
        live: whether a path does that autograd can follow, past every operation whose gradient is zero by definition.
        cuts: the operations at which other paths end.
    """

    live: bool
    cuts: tuple[str, ...]


def connection(subject: Subject, leaf: Leaf) -> Connection:
    """Follow the tensor through one more forward."""
    trace = _Trace()
    with _alone(subject, leaf), torch.enable_grad(), trace:
        outputs = subject.outputs()
    weights = subject.output_weights()
    ends = [output for output, weight in zip(outputs, weights, strict=True) if weight is not None]
    live = any(map(trace.is_live, ends))
    cuts = dict.fromkeys(cut for end in ends for cut in trace.cuts_of(end))
    if not live and not cuts:
        cuts = dict.fromkeys(trace.taken)
    return Connection(live, tuple(cuts))


def partial_cut(subject: Subject, leaf: Leaf) -> str | None:
    """Where a part of the tensor's paths ends on purpose, as a hint at why its gradient is wrong."""
    meant = [cut for cut in connection(subject, leaf).cuts if cut.startswith(_ON_PURPOSE)]
    return ", ".join(meant) or None


@contextmanager
def _alone(subject: Subject, leaf: Leaf) -> Iterator[None]:
    others = [other.tensor for other in subject.leaves.values() if other is not leaf]
    for other in others:
        other.requires_grad_(False)
    try:
        yield
    finally:
        for other in others:
            other.requires_grad_(True)


class _Trace(TorchFunctionMode):
    """Follows values by the Python operations that make them.

    Attributes:
        taken: operations that took a value out of its tensor, after which nobody can follow it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str] = []
        self._held: list[Tensor] = []  # an id names a tensor only while it lives
        self._cuts: dict[int, dict[str, None]] = {}
        self._blocked: set[int] = set()  # autograd has a path, and sends zeros along it

    def is_live(self, tensor: Tensor) -> bool:
        """Whether a gradient can come through it."""
        return tensor.requires_grad and id(tensor) not in self._blocked

    def cuts_of(self, tensor: Tensor) -> dict[str, None]:
        """The cuts behind a value."""
        return self._cuts.get(id(tensor), {})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        live = [tensor for tensor in given if self.is_live(tensor)]
        cuts = {cut: None for tensor in given for cut in self.cuts_of(tensor)}
        result = func(*args, **(kwargs or {}))
        name = plain_name(func)
        if not (live or cuts) or name.endswith("_like") or name.startswith("new_"):
            return result
        if name in _TO_PYTHON and not isinstance(result, Tensor):
            self.taken += [*cuts, *([name] if live else [])]
        made = args[:1] if name == "setitem" else tree_leaves(result)
        for tensor in made:
            if isinstance(tensor, Tensor):
                self._judge(tensor, name, live, cuts, kwargs or {})
        return result

    def _judge(
        self, made: Tensor, name: str, live: list[Tensor], cuts: dict[str, None], kwargs: dict[str, Any]
    ) -> None:
        self._held.append(made)
        zero = name in _ZERO_BY_DEFINITION or bool(kwargs.get("rounding_mode"))
        function = function_at_work()
        if live and zero and function is None:
            cuts = {**cuts, _cut_name(name, made): None}
            self._blocked.add(id(made))
        elif live and not made.requires_grad:
            cuts = {**cuts, function or _cut_name(name, made): None}
        elif not live and made.requires_grad:
            self._blocked.add(id(made))
        self._cuts[id(made)] = {**self.cuts_of(made), **cuts}


def full_name(func: Any) -> str:
    """`Tensor.argmax`, `nn.functional.softmax`."""
    name: str = resolve_name(func) or getattr(func, "__name__", "an operation")
    return name.removeprefix("torch.")


def plain_name(func: Any) -> str:
    """`argmax` of `torch.Tensor.argmax`, `data` of the property, `add` of `add_` and `__iadd__`."""
    full: str = (resolve_name(func) or getattr(func, "__name__", "")).removesuffix(".__get__")
    return full.rpartition(".")[2].strip("_")


def _cut_name(name: str, made: Tensor) -> str:
    if name in _SHOWN_AS:
        return _SHOWN_AS[name]
    if name in _SAMPLING:
        return f"sampling ({name})"
    if not (made.is_floating_point() or made.is_complex()):
        return f"integer cast ({name})" if name in _CASTS else name
    if not torch.is_grad_enabled() and name != "detach":
        return "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
    return name


def function_at_work() -> str | None:
    """The class of the `autograd.Function` whose forward is running; None: none is."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "apply" and frame.f_code.co_filename.endswith("autograd/function.py"):
            owner = frame.f_locals.get("cls")
            return str(getattr(owner, "__name__", "autograd.Function"))
        frame = frame.f_back  # type: ignore[assignment]
    return None
