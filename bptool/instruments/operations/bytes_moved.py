"""Bytes that an operation has to move: what it reads, once, and what it writes, once.

Views move nothing, and an uninitialised tensor is not written. What is worked on in place is read and written. An
expanded tensor is read at the size of its storage. A lookup reads the rows that it returns rather than the table, and
a scatter writes as much as its source holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MAKES_ROOM = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
_WRITES_ONLY = {"zero_", "fill_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "resize_"}
_FILLS = {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full"}
_LOOKS_UP = {"embedding", "index", "index_select", "gather", "take"}
_SCATTERS = {"scatter_", "scatter_add_", "index_put_", "_index_put_impl_", "index_add_", "index_copy_"}


class Touched(NamedTuple):
    """A tensor that an operation takes or gives: the identity of its storage, where in it, and its bytes."""

    storage: int
    offset: int
    n_bytes: int


class _Access(NamedTuple):
    """What an operation does with its arguments: positions and names of those that it writes to."""

    name: str
    written: tuple[int, ...]
    written_names: tuple[str, ...]
    writes_only: bool


def touched(tensor: Tensor) -> Touched:
    """Of a sparse tensor nothing is known."""
    if tensor.layout is not torch.strided:
        return Touched(id(tensor), 0, 0)
    storage = tensor.untyped_storage()  # its Python object lives as long as the storage does
    return Touched(id(storage), int(tensor.storage_offset()), min(tensor.numel() * tensor.itemsize, storage.nbytes()))


def bytes_moved(
    func: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Touched],
    results: Sequence[Touched],
) -> int:
    """By one operation; `inputs` are the tensors among its positional arguments, `results` its results."""
    access = _access(func)
    if access.name in _MAKES_ROOM:
        return 0
    sources = {one.storage for one in inputs}
    new = sum(one.n_bytes for one in results if one.storage not in sources)
    if not access.written and not access.written_names:
        if results and not new:
            return 0  # a view, or a tensor that needed no copy
        if access.name in _FILLS:
            return new
        if access.name in _LOOKS_UP:
            return 2 * new + sum(one.n_bytes for one in inputs[1:])
        return new + sum(one.n_bytes for one in set(inputs))
    if access.name in _SCATTERS:
        others = sum(one.n_bytes for one in inputs[1:])
        return others + 2 * (inputs[-1].n_bytes if len(inputs) > 2 else inputs[1].n_bytes if len(inputs) > 1 else 0)
    written = [args[i] for i in access.written if i < len(args)]
    written += [kwargs[name] for name in access.written_names if kwargs.get(name) is not None]
    writes = [touched(x) for arg in written for x in (arg if isinstance(arg, list | tuple) else [arg])]
    reads = set(inputs) - set(writes) if access.writes_only else set(inputs)
    return new + sum(one.n_bytes for one in writes) + sum(one.n_bytes for one in reads)


@cache
def _access(func: torch._ops.OpOverload) -> _Access:
    name = str(func.overloadpacket).rpartition(".")[2]
    arguments = func._schema.arguments
    writes = [(i, a) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    if name.startswith("_fused_"):
        writes = [(i, a) for i, a in writes if a.name != "grads"]  # written only where a loss scale is undone there
    positions = tuple(i for i, a in writes if not a.kwarg_only)
    names = tuple(a.name for _, a in writes if a.kwarg_only)
    return _Access(name, positions, names, name in _WRITES_ONLY)
