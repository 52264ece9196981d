"""A function's sample inputs: copied, in float64, each tensor with the name that the function gives it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten  # pytrees have no public name yet

from bptool.errors import TargetError


class Arguments:
    """Positional and keyword arguments.

    Args:
        convert: whether floating point tensors become float64 and complex ones complex128.

    Raises:
        TargetError: an input is of a kind that has no dense float64 form.
    """

    def __init__(self, function: Callable[..., Any], inputs: Any, *, convert: bool = True) -> None:
        args, kwargs = _split(inputs)
        paths, self._spec = tree_flatten_with_path((args, kwargs))
        known: dict[int, Tensor] = {}
        self._leaves = [_own(leaf, convert, known) for _, leaf in paths]
        names = _names(function, args, kwargs)
        self._names = [names[_key(path[0]), _key(path[1])] + keystr(path[2:]) for path, _ in paths]

    def call(self, function: Callable[..., Any]) -> Any:
        """The function's result on these arguments."""
        args, kwargs = tree_unflatten(self._leaves, self._spec)
        return function(*args, **kwargs)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once, with its name: the argument's, or `input[0]` where the function names none."""
        seen: set[int] = set()
        for name, leaf in zip(self._names, self._leaves, strict=True):
            if isinstance(leaf, Tensor) and id(leaf) not in seen:
                seen.add(id(leaf))
                yield name, leaf

    @contextmanager
    def swapped(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While entered, each tensor is what `change` makes of it."""
        before = self._leaves
        self._leaves = [change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in before]
        try:
            yield
        finally:
            self._leaves = before

    def replaced(self, change: Callable[[Tensor], Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments with each tensor changed."""
        leaves = [change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs


@dataclass
class ModelLoss:
    """A loss of a model and a batch, as a function of the batch that knows the model's parameters."""

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]

    def __call__(self, batch: Any) -> Tensor:
        """The loss of one batch."""
        return self.loss(self.model, batch)


def in_float64(tensor: Tensor) -> Tensor:
    """The same numbers in float64 or complex128; integers as they are."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


def module_of(function: Callable[..., Any]) -> nn.Module | None:
    """The module that a function is, or is a method, a partial call or a loss of."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, ModelLoss):
        return function.model
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _split(inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return [], dict(inputs)
    if isinstance(inputs, tuple | list):
        return list(inputs), {}
    return [inputs], {}


def _own(leaf: Any, convert: bool, known: dict[int, Tensor]) -> Any:
    """A copy of a tensor that is a leaf; a tensor that is given twice stays one."""
    if not isinstance(leaf, Tensor):
        return leaf
    if id(leaf) not in known:
        if leaf.layout != torch.strided or leaf.is_quantized or leaf.is_meta:
            kind = "quantized" if leaf.is_quantized else "on the meta device" if leaf.is_meta else str(leaf.layout)
            raise TargetError(f"an input is {kind}; the check takes dense tensors with values", "convert it first")
        own = leaf.detach().clone()
        own = in_float64(own) if convert else own
        known[id(leaf)] = own.requires_grad_(leaf.requires_grad)
    return known[id(leaf)]


def _names(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> dict[tuple[int, Any], str]:
    """What each argument is called: (0, number) of a positional one, (1, key) of a keyword."""
    called: list[str] = []
    try:
        parameters = list(inspect.signature(_forward(function)).parameters.values())
    except (TypeError, ValueError):  # a builtin has no signature
        parameters = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            break
        called.append(parameter.name)
    names: dict[tuple[int, Any], str] = {(0, i): f"input[{i}]" for i in range(len(args))}
    names |= {(0, i): name for i, name in enumerate(called[: len(args)])}
    return names | {(1, key): key for key in kwargs}


def _forward(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.forward if isinstance(function, nn.Module) else function


def _key(entry: Any) -> Any:
    return entry.idx if hasattr(entry, "idx") else entry.key
