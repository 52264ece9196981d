"""A ledger of live storages: what a step holds, when, and for what, recorded without allocating it.

Under `FakeTensorMode` tensors have shapes and no memory; the ledger sees every operation's results, counts each storage
once, and takes it off when the last tensor on it dies. That is what an allocator does, so the peak is the allocator's,
but for buffers that a kernel allocates and frees inside one operation.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
)  # no public name tells a fake tensor from a real one

from bptool.instruments.fake_values import device_of_fake, value_of_fake
from bptool.instruments.memory.abridged_loop import abridged
from bptool.instruments.memory.host_memory import stays_on_host
from bptool.instruments.memory.kept_numbers import MAY_SAVE_NUMBERS, KeptNumbers, saved_number_bytes
from bptool.instruments.memory.trace import Allocation, Category, Event, MemoryTrace
from bptool.instruments.whereabouts import Whereabouts
from bptool.training.instrument import Instrument, Phase
from bptool.training.operation_mode import OperationMode
from bptool.training.optimizers import Optimizers

Scratch = Callable[[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any], Any], int]
"""Bytes that a device's kernel takes for itself during one operation, from its arguments and its result."""


_ADD = torch.ops.aten.add.Tensor


class MemoryLedger(OperationMode, Instrument):
    """Records every storage's life while it is entered, and the phases that it is told of.

    Args:
        counts_host: whether what operations keep in host memory (scalars, random states) counts, as it does on a CPU.
        scratch: what kernels take besides their results; None: nothing.
    """

    def __init__(self, *, counts_host: bool = True, scratch: Scratch | None = None) -> None:
        super().__init__()
        self._counts_host = counts_host
        self._scratch = scratch
        self._allocations: list[Allocation] = []
        self._events: list[Event] = []
        self._indices: dict[int, int] = {}  # a live storage's identity to its allocation
        self._on_host: set[int] = set()  # identities of live storages that are not counted
        self._phases: list[Phase] = []
        self._steps = -1
        self._loose_ends = 0  # releases at the end of the events that are not in order yet
        self._loose_place: str | None = None  # the module at work when they came; None outside of all
        self._where = Whereabouts()
        self._numbers = KeptNumbers()
        self._asked = 0  # whose device was asked for last: autograd asks for a gradient's before it adds it to another
        self._sum: tuple[int, int] | None = None  # storages of such a sum's first term and of its result
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._model: nn.Module | None = None
        self._optimizers: Optimizers | None = None

    @contextmanager
    def watching(self, model: nn.Module, optimizers: Optimizers) -> Iterator[None]:
        """Name the model's modules and what belongs to its parameters."""
        self._model, self._optimizers = model, optimizers
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            self._settle(parameter, "parameters", name.rpartition(".")[0])
        with self._where.following(model):
            yield

    def hold(self, n_bytes: int, what: str) -> None:
        """Count what no operation makes and nothing releases."""
        self._allocate(n_bytes, what, "", None)

    def abridged(self, rounds: Sequence[Any]) -> Iterator[Any]:
        """Of a loop's rounds that are all alike those that have to be run for the record to hold them all."""
        return abridged(rounds, self._allocations, self._events, self._tidy)

    def trace(self) -> MemoryTrace:
        """The record so far."""
        self._tidy()
        return MemoryTrace(tuple(self._allocations), tuple(self._events))

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Note its beginning and end, and what its allocations turn out to be for."""
        return self._phase(name)

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        if name == "step":
            self._steps += 1
            self._where.forget()
        self._phases.append(name)
        self._mark()
        begin = len(self._allocations)
        try:
            yield
        finally:
            self._settle_phase(name, begin)
            self._phases.pop()
            self._mark()

    def _settle_phase(self, name: Phase, begin: int) -> None:
        """What an allocation is for shows when the phase that made it ends."""
        if name == "data":
            self._recategorize(begin, "inputs")
        elif name in ("forward", "recompute"):
            self._recategorize(begin, "activations")
            if name == "recompute":
                self._numbers.after_recomputation()
        elif name == "backward":
            self._numbers.after_backward()
            for parameter in self._model.parameters() if self._model is not None else ():
                if parameter.grad is not None:
                    self._settle(parameter.grad, "gradients", self._where.owner(parameter))
        elif name == "optimizer" and self._optimizers is not None:
            for key, tensor in self._optimizers.state().items():
                self._settle(tensor, "optimizer_state", key.rpartition("/")[0].rpartition(".")[0])

    def _recategorize(self, begin: int, category: Category) -> None:
        """Whatever was made since `begin` and still lives."""
        for allocation in self._allocations[begin:]:
            if allocation.died is None and allocation.category == "temporaries":
                allocation.category = category

    def _settle(self, tensor: Tensor, category: Category, module: str) -> None:
        index = self._indices.get(id(tensor.untyped_storage()))
        if index is not None:
            self._allocations[index].category, self._allocations[index].module = category, module

    def __enter__(self) -> MemoryLedger:
        self._stack = ExitStack()
        if self._counts_host:
            # Activation checkpointing keeps a random state for each block, which is made outside of any operation.
            self._stack.enter_context(patch.object(torch, "get_rng_state", self._noted_rng_state(torch.get_rng_state)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def _noted_rng_state(self, get: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def get_rng_state() -> Tensor:
            state = get()
            self._note(state, "get_rng_state", self._where.module() or "")
            return state

        return get_rng_state

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        device = device_of_fake(func, args)
        if device is not None:
            self._asked = id(args[0])
            return device
        value = value_of_fake(func, args, self._phases[-1] if self._phases else "")
        if value is not None:
            return value
        kwargs = kwargs or {}
        self._numbers.before_operation()
        result = func(*args, **kwargs)
        if not self._counts_host:
            self._pass_over_host(func, result)
        kept = self._note_number(func, args) if self._counts_host and func.overloadpacket in MAY_SAVE_NUMBERS else 0
        if isinstance(result, Tensor):
            if id(result.untyped_storage()) not in self._indices:
                self._note(result, _name(func), self._place(args))
            if func is _ADD and self._asked == id(args[1]) and self._adds_gradients() and _may_be_added_to(args[0]):
                self._sum = (id(args[0].untyped_storage()), id(result.untyped_storage()))
        elif isinstance(result, list | tuple):
            self._note_results(result, func, args)
        if self._scratch is not None:
            n_bytes = self._scratch(func, args, kwargs, result) - kept
            if n_bytes > 0:
                self._free(self._allocate(n_bytes, _name(func), self._place(args), None))
        return result

    def _note_number(self, func: torch._ops.OpOverload, args: tuple[Any, ...]) -> int:
        """Bytes of the number that autograd keeps of this operation."""
        n_bytes = saved_number_bytes(func, args)
        if n_bytes:
            index = self._allocate(n_bytes, _name(func), self._place(args), None)
            self._numbers.keep(partial(self._free, index), recomputes=self._phases[-1:] == ["recompute"])
        return n_bytes

    def _note_results(self, results: Iterable[Any], func: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
        for i, leaf in enumerate(results):
            if isinstance(leaf, Tensor):
                # An operation on lists of tensors makes the i-th result from the i-th of each.
                sources = [arg[i] for arg in args if isinstance(arg, list | tuple) and i < len(arg)]
                self._note(leaf, _name(func), self._place(sources or args))

    def _pass_over_host(self, func: torch._ops.OpOverload, result: Any) -> None:
        """Don't count what a device's run would have in host memory, now or when it is worked on later."""
        phase = self._phases[-1] if self._phases else ""
        for i, leaf in enumerate(result if isinstance(result, list | tuple) else [result]):
            if isinstance(leaf, Tensor) and stays_on_host(func, i, phase):
                storage = leaf.untyped_storage()
                self._on_host.add(id(storage))
                weakref.finalize(storage, self._on_host.discard, id(storage)).atexit = False

    def _place(self, args: Iterable[Any]) -> str:
        """The module at work, or the one of what is worked on."""
        module = self._where.module()
        return self._owner(args) if module is None else module

    def _owner(self, args: Iterable[Any]) -> str:
        """Outside of all modules: the module of what is worked on."""
        for arg in args:
            if isinstance(arg, Tensor):
                index = self._indices.get(id(arg.untyped_storage()))
                if index is not None and self._allocations[index].module:
                    return self._allocations[index].module
        return ""

    def _note(self, tensor: Tensor, op: str, module: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # the storage's Python object lives as long as the storage does
        if key in self._indices or key in self._on_host or _is_meta(tensor):
            return
        self._indices[key] = self._allocate(storage.nbytes(), op, module, tensor)
        self._watched[key] = weakref.ref(storage, partial(self._release, key))

    def _allocate(self, n_bytes: int, op: str, module: str, tensor: Tensor | None) -> int:
        self._tidy()
        index = len(self._allocations)
        described = "" if tensor is None else f"{_dtype_name(tensor.dtype)}{list(tensor.shape)}"
        phase = self._phases[-1] if self._phases else ""
        self._allocations.append(
            Allocation(n_bytes, "temporaries", module, op, described, phase, born=len(self._events))
        )
        self._events.append(Event(index, n_bytes, self._steps, phase, module, op))
        return index

    def _release(self, key: int, _: object) -> None:
        del self._watched[key]
        index = self._indices.pop(key)
        if self._sum is not None and self._sum[0] == key and self._take_over(index, self._sum[1]):
            return
        self._free(index)

    def _adds_gradients(self) -> bool:
        """Whether it can be autograd that adds; an update rule asks for devices too, and adds what it likes."""
        return self._phases[-1:] != ["optimizer"]

    def _take_over(self, index: int, key: int) -> bool:
        """Whether the storage of the sum, `key`, is that of its first term, `index`, which is let go of.

        Gradients that meet are added in place where autograd alone holds the first (input_buffer.cpp), but not where
        they are fake: there is a new storage, and the first one dies at once.
        """
        self._sum = None
        made = self._indices.get(key)
        if made is None or made != len(self._allocations) - 1 or self._events[-1].allocation != made:
            return False
        self._allocations.pop()
        self._events.pop()
        self._indices[key] = index
        return True

    def _free(self, index: int) -> None:
        allocation = self._allocations[index]
        allocation.died = len(self._events)
        phase = self._phases[-1] if self._phases else ""
        module = self._where.module()
        if module != self._loose_place:
            self._tidy()
            self._loose_place = module
        self._loose_ends += 1
        module = allocation.module if module is None else module
        self._events.append(Event(index, -allocation.n_bytes, self._steps, phase, module, ""))

    def _tidy(self) -> None:
        """Put releases in one place, one right after another, into the order of their allocation.

        Autocast drops its copies of weights in the order of a hash table; no sum depends on it, and like records are
        to look alike.
        """
        if self._loose_ends > 1:
            tail = sorted(self._events[-self._loose_ends :], key=lambda event: event.allocation or 0)
            self._events[-self._loose_ends :] = tail
            for time, event in enumerate(tail, len(self._events) - len(tail)):
                if event.allocation is not None:
                    self._allocations[event.allocation].died = time
        self._loose_ends = 0

    def _mark(self) -> None:
        self._tidy()
        phase = self._phases[-1] if self._phases else ""
        self._events.append(Event(None, 0, self._steps, phase, self._where.module() or "", ""))


def _is_meta(tensor: Tensor) -> bool:
    """Whether it has no memory on any device; a fake one is meta underneath, whatever it stands for."""
    return (tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device).type == "meta"


def _may_be_added_to(tensor: Tensor) -> bool:
    """Whether autograd would, if it is the only holder: not to a view, whose base is a holder, nor to one with gaps."""
    if torch.is_grad_enabled() or tensor._is_view():
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@functools.cache
def _name(func: torch._ops.OpOverload) -> str:
    """Without its overload, such as `aten.mm`."""
    return str(func.overloadpacket)


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
