"""What the recorder itself adds to each operation on a CPU, measured on a model where there is little else."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import nn

from bptool.instruments.operation_recorder import OperationRecorder
from bptool.instruments.operation_trace import OperationTrace
from bptool.instruments.phase_timer import PhaseTimer
from bptool.training.instrument import Announcer, Instrument

_LAYERS, _TURNS = 12, 7


def recorder_cost_s() -> dict[str, float]:
    """Seconds by phase: what an operation and the time before it take in a record, less what they take without one.

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

    costs = _cost(model, step)
    return costs | {"recompute": costs["forward"], "clip": costs["optimizer"], "data": costs["optimizer"]}


def _cost(model: nn.Module, step: Callable[[Announcer], None]) -> dict[str, float]:
    plain: dict[str, list[float]] = defaultdict(list)
    recorded: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = {}
    for _ in range(_TURNS):
        _timed(step, plain)
        counts = _add(_record(model, step), recorded)
    return {phase: max(min(recorded[phase]) - min(plain[phase]), 0.0) / counts[phase] for phase in recorded}


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


def _add(trace: OperationTrace, seconds: Mapping[str, list[float]]) -> dict[str, int]:
    """A trace's seconds by phase, next to those of the turns before; returns how many operations each phase has."""
    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for operation in trace.operations:
        totals[operation.phase] += operation.outside_s + operation.duration_s
        counts[operation.phase] += 1
    for phase, total in totals.items():
        seconds[phase].append(total)
    return counts
