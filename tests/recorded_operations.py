"""Records of operations that several tests make: a model's forward and backward, and sums over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from small_runs import run_steps, transformer_step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bptool.instruments.operations.recorder import OperationRecorder
from bptool.instruments.operations.trace import Operation, OperationTrace

X = torch.randn(5, 16)
LINEAR = 2 * 5 * 16 * 16
"""FLOPs of a 16 x 16 layer on `X`."""


def linear(trained: bool = True) -> nn.Linear:
    return nn.Linear(16, 16).requires_grad_(trained)


def recorded(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None) -> OperationTrace:
    """One forward and its backward; the loss is the sum of what the model returns (first), where none is given."""
    recorder = OperationRecorder()
    with recorder, recorder.watching(model), recorder.phase("step"):
        with recorder.phase("forward"):
            result = model(*inputs)
            value = loss(result) if loss else (result if isinstance(result, Tensor) else result[0]).sum()
        with recorder.phase("backward"):
            value.backward()
    return recorder.trace()


def flops(operations: Iterable[Operation], **wanted: str) -> int:
    """Of those whose attributes are as wanted, such as `kind="wgrad"`."""
    return sum(o.flops * o.times for o in operations if all(getattr(o, k) == v for k, v in wanted.items()))


def split(trace: OperationTrace, module: str | None = None) -> tuple[int, int, int, int]:
    """FLOPs of forward, dgrad, wgrad and recomputation, of one module alone where it is named."""
    where = {} if module is None else {"module": module}
    forward, dgrad, wgrad, again = (
        flops(trace.operations, kind=kind, **where) for kind in ("forward", "dgrad", "wgrad", "recompute")
    )
    return forward, dgrad, wgrad, again


def trainer_record(config: Any, micro_batches: int = 1, fake: bool = False) -> OperationTrace:
    """The second step of the trainer's own transformer."""
    recorder = OperationRecorder()
    with FakeTensorMode() if fake else nullcontext():
        step = transformer_step(config, recorder)
        with recorder, recorder.watching(step.model):
            run_steps(step, 2, micro_batches)
    return recorder.traces()[-1]
