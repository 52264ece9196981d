"""What an operation costs: seconds of a run of it by itself, on this machine, or an estimate from what it computes.

The estimate is a roofline's, arithmetic or memory traffic, the slower of both; nothing is run for it, it is the same
at every time, and its unit is the time of one FLOP at the device's full matrix rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map  # what torch itself nests tensors with

from bptool.analysis.profile.roofline import gpu_rates
from bptool.gpus import Gpu
from bptool.instruments.operations.log import Operation, Shape
from bptool.training.selective import Attention, selective_contexts

_CPU_FLOPS_PER_BYTE = 20.0
"""A core's matrix rate over its share of the memory's, roughly: a CPU's own would be another each time."""
_CPU_WATCHING = 5e5
"""5 microseconds of a core that does 100 GFLOP/s."""
_SECONDS, _RUNS = 0.1, 5
"""For one operation: it is run so often or so long, at least once after a first time, and the shortest run counts."""
_OTHERS = 2**24
"""Numbers that are written before each run: a step has been elsewhere since it made what an operation reads."""
_MANY = 200
"""Operations in a row, to tell what it takes to watch one of them."""
_FUSED = frozenset(
    {
        *("sum", "mean", "amax", "var_mean", "_softmax", "_safe_softmax", "_log_softmax"),
        *("native_layer_norm", "_fused_rms_norm", "native_dropout", "bernoulli_", "rand_like"),
        *("_to_copy", "copy_", "clone", "cat", "constant_pad_nd", "embedding", "index", "gather", "tril", "triu"),
        *("zeros", "ones", "zeros_like", "ones_like", "new_zeros", "new_ones", "arange", "scalar_tensor"),
    }
)
"""What TorchInductor writes into its loops besides pointwise operations: reductions, copies and what is made up."""


class Costs(Protocol):
    """Of operations, all in one unit.

    Attributes:
        basis: where they are from, in words.
    """

    basis: str

    def of(self, operation: Operation) -> float:
        """What it takes."""

    def of_watching(self) -> float:
        """What it takes to ask, of one operation in a block that keeps some results, whether its own is one."""


def total(costs: Costs, operations: Iterable[Operation]) -> float:
    """Of all of them together."""
    return sum(map(costs.of, operations))


class Estimated:
    """By a roofline.

    Args:
        gpu: the device; None for a CPU.
        mode: `precision.mode`.
    """

    basis = "by a roofline estimate"

    def __init__(self, gpu: Gpu | None, mode: str) -> None:
        self._gpu = gpu
        self._flops_per_byte = gpu_rates(gpu, mode).roofline.ridge if gpu else _CPU_FLOPS_PER_BYTE

    def of(self, operation: Operation) -> float:
        """What it takes."""
        return max(float(operation.flops), operation.traffic_bytes * self._flops_per_byte)

    def of_watching(self) -> float:
        """On a CPU a few microseconds; before a GPU the host is taken to run ahead."""
        return 0.0 if self._gpu else _CPU_WATCHING


class InCompiled:
    """In blocks that are compiled: what is fused with what is next to it is taken as free.

    Computing that again reads what is read anyway. Products, convolutions, attention, sorting and whatever else the
    compiler calls as it is cost what they do by themselves.

    Args:
        costs: of operations by themselves.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.basis = f"{costs.basis}, what the compiler fuses being free"

    def of(self, operation: Operation) -> float:
        """What it takes."""
        func = operation.func
        fused = torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in _FUSED
        return 0.0 if fused and not operation.flops else self._costs.of(operation)

    def of_watching(self) -> float:
        """Nothing: what is saved is chosen when the block is compiled."""
        return 0.0


class Measured:
    """By running each operation on the device, on made-up values, once for all that are alike.

    What cannot be run so, such as the products of experts, where values tell how many rows each of them has, is
    estimated at the rate of what was measured.

    Args:
        estimated: the same device's estimate.
        clock: in seconds; None: of this thread on a CPU, which takes its share of an operation, else of the wall.
    """

    basis = "by operations' times measured here"

    def __init__(self, device: torch.device, estimated: Estimated, *, clock: Callable[[], float] | None = None) -> None:
        # A CPU's own time: what else the machine does at that moment is no part of an operation.
        own = time.perf_counter if device.type == "cuda" else time.thread_time
        self._device, self._estimated, self._clock = device, estimated, clock or own
        self._known: dict[str, float | None] = {}
        self._seconds = self._effort = 0.0
        self._watching: float | None = None

    def of(self, operation: Operation) -> float:
        """What it takes."""
        if operation.traffic_bytes == 0:
            return 0.0
        key = f"{operation.func} {operation.call}"
        if key not in self._known:
            self._known[key] = self._measured(operation)
        seconds = self._known[key]
        return self._rate * self._estimated.of(operation) if seconds is None else seconds

    @cached_property
    def _others(self) -> Tensor:
        return torch.empty(_OTHERS, device=self._device)

    @property
    def _rate(self) -> float:
        """Seconds of what is 1 by the estimate."""
        return self._seconds / self._effort if self._effort else 1e-11

    def _measured(self, operation: Operation) -> float | None:
        """None where it does not run on made-up values, or tells too little."""
        shapes = [leaf for leaf in tree_leaves(operation.call) if isinstance(leaf, Shape)]
        if operation.flops and not all(shape.dtype.is_floating_point for shape in shapes):
            return None
        try:
            args, kwargs = tree_map(self._made, operation.call)
            with torch.no_grad():
                seconds = self._best(lambda: operation.func(*args, **kwargs))
        except Exception:  # whatever it asks of its values
            return None
        self._seconds += seconds
        self._effort += self._estimated.of(operation)
        return seconds

    def _made(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return self._device
        if not isinstance(leaf, Shape):
            return leaf
        values: Tensor = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=self._device)
        return values.uniform_(0.5, 1.0) if leaf.dtype.is_floating_point else values.zero_()

    def _best(self, run: Callable[[], object]) -> float:
        run()
        times: list[float] = []
        while len(times) < _RUNS and sum(times) < _SECONDS:
            self._others.fill_(1.0)
            before = self._now()
            run()
            times.append(self._now() - before)
        return min(times)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()

    def of_watching(self) -> float:
        """What it takes to ask, of one operation in a block that keeps some results, whether its own is one."""
        if self._watching is None:
            plain, watched = self._best(self._many), self._best(self._watched)
            self._watching = max(watched - plain, 0.0) / _MANY
        return self._watching

    def _many(self) -> None:
        x = torch.ones(1, device=self._device)
        for _ in range(_MANY):
            x = x * 1.0

    def _watched(self) -> None:
        forward, _ = selective_contexts(Attention)
        with forward:
            self._many()
