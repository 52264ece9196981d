"""Records every operation of a step below autograd: whose it is, what for, what it costs, and when.

Which gradient an operation of a backward makes shows only when its node has run: its results are then among the node's
gradients, or went into one of them. So such a node's operations wait until then (`gradient_graph` says which).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import takewhile
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bptool.instruments.dispatch import is_composite
from bptool.instruments.fake_values import device_of_fake, value_of_fake
from bptool.instruments.operations.bytes_moved import Touched, bytes_moved, touched
from bptool.instruments.operations.clock import Clock
from bptool.instruments.operations.flop_formulas import flops_of, is_causal
from bptool.instruments.operations.gradient_graph import Edges, GradientGraph, is_leaf, is_parameter
from bptool.instruments.operations.pointwise_flops import pointwise_flops
from bptool.instruments.operations.tape import Noted, Tape
from bptool.instruments.operations.trace import Kind, OperationTrace
from bptool.instruments.whereabouts import Whereabouts
from bptool.model.alike import abridging
from bptool.model.early_gradients import GradientOf, listening
from bptool.training.instrument import Instrument, Phase
from bptool.training.operation_mode import OperationMode

_MADE_EARLY: dict[GradientOf, Kind] = {"input": "dgrad", "parameters": "wgrad"}


class OperationRecorder(OperationMode, Instrument):
    """Records operations while it is entered, and the phases that it is told of.

    Args:
        clock: seconds, such as `time.perf_counter`, or a `CudaClock`; None: no times, as fake tensors have none.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self._clock = clock
        self._tape = Tape(clock)
        self._phases: list[Phase] = []
        self._micro_batch = -1
        self._where = Whereabouts()
        self._types: dict[str, str] = {}
        self._early: Kind | None = None
        self._times = 1
        self._last_number = 0  # autograd's, when the last operation had run
        self._graph = GradientGraph(self._after_node)
        self._waiting: list[Noted] = []  # operations of the node that is running
        self._running: int | None = None
        self._done = False  # and whether it has made its gradients
        self._writers: dict[int, Noted] = {}  # of each storage, the operation that made it
        self._loose: list[Noted] = []  # of a recomputation, outside of all calls in it
        self._called_again: list[str] = []  # the outermost calls of a recomputation

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Name the model's modules."""
        self._types |= {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}
        self._tape.types = self._types
        with self._where.following(model):
            yield

    def counting_once(self) -> AbstractContextManager[None]:
        """Have work that is alike done once: for fake tensors, whose values nobody needs."""
        return abridging(self._once)

    def trace(self) -> OperationTrace:
        """All steps so far in one record."""
        return self._tape.whole()

    def traces(self) -> list[OperationTrace]:
        """A record for each step so far."""
        return self._tape.steps()

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Note its beginning and end."""
        return self._phase(name)

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        if name == "step":
            self._where.forget()
            self._micro_batch = -1
            self._tape.begin_step(self._where.calls)
        self._micro_batch += name == "forward"
        self._phases.append(name)
        self._tape.begin(name)
        try:
            yield
        finally:
            self._phases.pop()
            self._tape.end()
            if name == "backward":
                self._leave_backward()

    def __enter__(self) -> OperationRecorder:
        self._stack = ExitStack()
        self._stack.enter_context(listening(self._hear))
        for name in ("backward", "grad"):  # `Tensor.backward` and reentrant checkpoints call these too
            entered = self._entering_graph(getattr(torch.autograd, name))
            self._stack.enter_context(patch.object(torch.autograd, name, entered))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def _hear(self, of: GradientOf | None) -> None:
        self._early = None if of is None else _MADE_EARLY[of]

    def _once(self, rounds: Sequence[Any]) -> Iterator[Any]:
        """The first of a loop's rounds for all that are like it, and the last."""
        if len(rounds) < 2:
            yield from rounds
            return
        outer = self._times
        self._times = outer * (len(rounds) - 1)
        try:
            yield rounds[0]
        finally:
            self._times = outer
        yield rounds[-1]

    def _entering_graph(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Look at the graph before it runs."""

        def noted(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if self._phases[-1:] != ["forward"]:
                roots = tensors if isinstance(tensors, Sequence) else [tensors]
                self._graph.add(root.grad_fn for root in roots if isinstance(root, Tensor))
            return run(tensors, *args, **kwargs)

        return noted

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        device = device_of_fake(func, args)
        if device is not None:
            return device
        if is_composite(func):  # not taken apart before in inference mode, and where it writes to `out`
            super().__enter__()  # type: ignore[no-untyped-call]
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        clock = self._clock
        begin = clock() if clock is not None else None
        value = value_of_fake(func, args, self._phases[-1] if self._phases else "")
        result = func(*args, **kwargs) if value is None else value
        end = clock() if clock is not None else None
        self._note(func, args, kwargs, result, (begin, end))
        return result

    def _note(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        times: tuple[Any, Any],
    ) -> None:
        phase: Phase = self._phases[-1] if self._phases else "step"
        taken = list(_tensors(args))
        inputs = [touched(x) for x in taken]
        results = [_first_touched(one) for one in (result if isinstance(result, list | tuple) else [result])]
        noted = Noted(func, phase, times, _shapes(taken), _dtype(taken))
        noted.parts = flops_of(func, args, kwargs, result)
        noted.flops = sum(noted.parts or ())
        noted.causal = noted.parts is not None and is_causal(func, args, kwargs)
        noted.pointwise = 0 if noted.parts is not None else pointwise_flops(func, args, kwargs, result)
        noted.n_bytes = bytes_moved(func, args, kwargs, inputs, [one for one in results if one is not None])
        noted.result_bytes = tuple(0 if one is None else one.n_bytes for one in results)
        noted.micro_batch = max(self._micro_batch, 0) if phase in ("forward", "recompute", "backward") else 0
        noted.stands_for = self._times
        self._tape.add(noted)
        self._attribute(noted, inputs, results)
        self._last_number = torch._C._autograd._get_sequence_nr()
        self._tape.done(noted)

    def _attribute(self, noted: Noted, inputs: Sequence[Touched], results: Sequence[Touched | None]) -> None:
        """Whose it is and what for."""
        node = torch._C._current_autograd_node()
        phase = noted.phase
        if phase in ("clip", "optimizer"):
            noted.kind = "optimizer"
        elif phase == "recompute" or (phase == "backward" and node is not None and self._recomputes()):
            noted.kind = "recompute"
            self._place_recomputed(noted)
        elif phase == "backward" or (phase != "forward" and node is not None):
            noted.taken = tuple(one.storage for one in inputs)
            noted.made = tuple(None if one is None else one.storage for one in results)
            self._attribute_gradient(noted, node)
        else:
            noted.kind = self._early or "forward"
            noted.module = self._where.module() or ""
            number = torch._C._autograd._get_sequence_nr() - 1
            noted.node = number if number >= self._last_number else None

    def _recomputes(self) -> bool:
        """Whether a backward, which has no use for grad mode or calls, is making a forward again."""
        return torch.is_grad_enabled() or self._where.outermost is not None

    def _place_recomputed(self, noted: Noted) -> None:
        """What is recomputed is seldom called itself, so that it shows only when it calls something."""
        outermost = self._where.outermost
        if outermost is not None:
            if outermost not in self._called_again:
                self._called_again.append(outermost)
            noted.module = self._where.module() or ""
            return
        noted.module = self._where.module() or ""  # whose gradient waits for it
        self._loose.append(noted)

    def _end_recomputation(self) -> None:
        """It was of the module that is around its calls, or of the only one that it called."""
        if self._called_again:
            around = _common_parent(self._called_again)
            self._tape.note_recomputed(around if len(self._called_again) > 1 else self._called_again[0])
            for noted in self._loose:
                noted.module = around
        self._loose, self._called_again = [], []

    def _attribute_gradient(self, noted: Noted, node: Any) -> None:
        self._end_recomputation()
        if node is None:
            self._follow(noted)
        elif is_leaf(node):
            noted.kind = "wgrad" if is_parameter(node.variable) else "dgrad"
            noted.module = self._where.module() or ""
        else:
            self._attribute_to_node(noted, node)
        self._note_writer(noted)

    def _attribute_to_node(self, noted: Noted, node: Any) -> None:
        noted.node = node._sequence_nr()
        noted.module = self._where.module() or ""
        if noted.node != self._running:
            self._running, self._waiting, self._done = noted.node, [], False
        edges = set(self._graph.edges(node)) - {None}
        noted.kind = "wgrad" if edges == {"wgrad"} else "dgrad"
        if len(edges) > 1 and self._done:
            self._follow(noted)
        elif len(edges) > 1:
            self._waiting.append(noted)

    def _follow(self, noted: Noted) -> None:
        """After a node autograd adds its gradients to others that they meet: what for is known of what is added."""
        writer = next((self._writers[one] for one in reversed(noted.taken) if one in self._writers), None)
        noted.kind = "dgrad" if writer is None else writer.kind
        noted.module = "" if writer is None else writer.module

    def _note_writer(self, noted: Noted) -> None:
        for storage in noted.made:
            if storage is not None and storage not in noted.taken:
                self._writers[storage] = noted

    def _after_node(self, number: int, edges: Edges, gradients: Sequence[Tensor | None]) -> None:
        """Follow a node's gradients back to the operations that made them."""
        wanted: dict[int, set[str]] = {}
        for kind, gradient in zip(edges, gradients, strict=False):
            if kind is not None and gradient is not None:
                wanted.setdefault(touched(gradient).storage, set()).add(kind)
        for noted in reversed(self._waiting):
            purposes = [wanted.get(one, set()) if one is not None else set() for one in noted.made]
            together = set().union(*purposes)
            for one in noted.made:
                if one is not None and one not in noted.taken:
                    wanted.pop(one, None)  # before this it was another tensor's
            for one in noted.taken:
                wanted.setdefault(one, set()).update(together)
            if together:
                noted.kind = "wgrad" if together == {"wgrad"} else "dgrad"
            if len(together) > 1 and {"wgrad"} in purposes:
                noted.wgrad_results = tuple(purpose == {"wgrad"} for purpose in purposes)
        self._running, self._waiting, self._done = number, [], True

    def _leave_backward(self) -> None:
        self._end_recomputation()
        where = {self._where.recorded_by(number) for number in self._graph.numbers}
        where |= {self._where.owner(leaf) for leaf in self._graph.leaves.values()}
        self._tape.note_differentiated(where)
        self._graph = GradientGraph(self._after_node)
        self._waiting, self._running, self._done, self._writers = [], None, False, {}


def _common_parent(names: Sequence[str]) -> str:
    """`["a.0.x", "a.0.y.z"]` to `a.0`."""
    parents = [name.split(".")[:-1] for name in names]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    return ".".join(parts[0] for parts in same)


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (one for one in arg if isinstance(one, Tensor))


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Of at most four tensors: an update takes a thousand."""
    return tuple(tuple(x.shape) for x in tensors[:4])


def _first_touched(value: Any) -> Touched | None:
    """Of a result, or of the first of a list."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return touched(value) if isinstance(value, Tensor) else None


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The first one's that is a number with a fraction, or the first one's."""
    floating = next((x.dtype for x in tensors if x.dtype.is_floating_point), None)
    return floating or (tensors[0].dtype if tensors else None)
