"""What the recorder itself adds to each operation on a CPU, measured on a model where there is little else."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from bptool.instruments.operations.recorder import OperationRecorder
from bptool.instruments.operations.trace import Operation, OperationTrace
from bptool.instruments.phase_timer import PhaseTimer
from bptool.training.instrument import Announcer, Instrument

_LAYERS, _TURNS = 12, 7


class RecorderCost(NamedTuple):
    """Seconds that a record adds to an operation and the time before it.

    Attributes:
        inside_s: the part of it that may lie inside of the operation: its second way through the dispatcher.
    """

    together_s: float
    inside_s: float


NOTHING_ADDED = RecorderCost(0.0, 0.0)


def recorder_costs() -> dict[str, RecorderCost]:
    """By phase: what an operation and the time before it take in a record, less what they take without one.

    Steps with and without the recorder take turns, and the shortest of either count. In forward and backward it is of
    tiny layers, as modules and autograd's nodes are watched too; elsewhere of operations alone.
    """
    with torch.random.fork_rng(devices=[]):  # the run's random numbers are not ours to draw
        layers = [layer for _ in range(_LAYERS) for layer in (nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())]
    model, x, gradients = nn.Sequential(*layers), torch.ones(4, 4), [torch.ones(4) for _ in range(100)]

    def step(announcer: Announcer) -> None:
        with announcer.phase("step"):
            with announcer.phase("forward"):
                loss = model(x).sum()
            with announcer.phase("backward"):
                loss.backward()
            with announcer.phase("optimizer"):
                for gradient in gradients:
                    gradient.mul_(1.0)

    costs = _costs(model, step)
    return costs | {"recompute": costs["forward"], "clip": costs["optimizer"], "data": costs["optimizer"]}


def _costs(model: nn.Module, step: Callable[[Announcer], None]) -> dict[str, RecorderCost]:
    plain: dict[str, list[float]] = defaultdict(list)
    traces = []
    for _ in range(_TURNS):
        _timed(step, plain)
        traces.append(_record(model, step))
    shortest = {phase: min(seconds) for phase, seconds in plain.items()}
    # The dispatcher is the same everywhere, and shows where there is nothing but operations.
    inside_s = _added([_of_phase(trace, "optimizer") for trace in traces], shortest["optimizer"], between=False)
    phases = {operation.phase for operation in traces[0].operations}
    together = {phase: _added([_of_phase(t, phase) for t in traces], shortest[phase], between=True) for phase in phases}
    return {phase: RecorderCost(seconds, inside_s) for phase, seconds in together.items()}


def _added(records: Sequence[Sequence[Operation]], plain_s: float, *, between: bool) -> float:
    """To one operation of the shortest record."""
    shortest = min(sum(one.duration_s + between * one.outside_s for one in record) for record in records)
    return max(shortest - plain_s, 0.0) / len(records[0])


def _of_phase(trace: OperationTrace, phase: str) -> list[Operation]:
    return [operation for operation in trace.operations if operation.phase == phase]


def _timed(step: Callable[[Announcer], None], seconds: Mapping[str, list[float]]) -> None:
    timer = PhaseTimer(torch.device("cpu"))
    step(_told(timer))
    for phase, took in timer.collect().items():
        seconds[phase].append(took)


def _record(model: nn.Module, step: Callable[[Announcer], None]) -> OperationTrace:
    recorder = OperationRecorder(time.perf_counter)
    with recorder.watching(model), recorder:
        step(_told(recorder))
    return recorder.trace()


def _told(instrument: Instrument) -> Announcer:
    return Announcer([instrument])
