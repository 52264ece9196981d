"""The real step under a timer alone, and in between, a few times, under the recorder too.

Recording disturbs timing, so these are different steps; they take turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bptool.analysis.profile.noise import noise_warnings
from bptool.analysis.profile.timing import Stop, TimedStep, time_steps, without_inner
from bptool.analysis.question import Question
from bptool.analysis.real_step import RealStep
from bptool.hardware import tune_cpu_allocator
from bptool.instruments.cpu_use import read_cpu, used_between
from bptool.instruments.operations.clock import Clock, CudaClock
from bptool.instruments.operations.recorder import OperationRecorder
from bptool.instruments.operations.trace import OperationTrace
from bptool.instruments.phase_timer import PhaseTimer
from bptool.training.interruption import StopRequest

_FORWARDS = 5


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        steps: timed ones.
        warmup: before them, not kept.
        recorded: between them, with each operation on its own.
        measure: whether anything is.
    """

    steps: int = 10
    warmup: int = 3
    recorded: int = 3
    measure: bool = True


@dataclass(frozen=True)
class Measurement:
    """What was gathered.

    Attributes:
        timed: steps with nothing but the timer inside; empty where Ctrl-C came before the first.
        recorded: steps under the recorder.
        traces: of those.
        forward_s: of forwards that keep nothing for a backward, all micro-batches of a step; None where none was run.
        warnings: what makes the times doubtful.
        interrupted: Ctrl-C came.
    """

    timed: tuple[TimedStep, ...]
    recorded: tuple[TimedStep, ...]
    traces: tuple[OperationTrace, ...]
    forward_s: float | None
    warnings: tuple[str, ...]
    interrupted: bool


Progress = Callable[[int, int], None]
"""Told after each step how many are done, of how many."""


def stoppable() -> StopRequest:
    """While entered, a first Ctrl-C leaves what was gathered to be told."""
    return StopRequest("printing what was gathered, after this step", "stopped at once")


def measure(question: Question, plan: Plan, stop: Stop, done: Progress = lambda number, total: None) -> Measurement:
    """Run the steps of `plan` on this machine, until `stop` asks to end.

    Raises:
        BptoolError: the step cannot be run here.
    """
    if question.machine.device == "cpu":
        tune_cpu_allocator()
    timer = PhaseTimer(torch.device(question.machine.device))
    real = RealStep(question, timer)
    recording = _Recording(real, timer)
    due = [] if question.config.training.compile else _spread(plan)

    def step_done(number: int, total: int) -> None:
        for _ in range(due.count(number)):
            if not stop.reason:
                recording.step()
        done(number, total)

    before = read_cpu()
    timed = time_steps(real.run, timer, warmup=plan.warmup, steps=plan.steps, stop=stop, done=step_done)
    use = used_between(before, read_cpu())
    forward_s = None if stop.reason or not timed else _bare_forward_s(real)
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    noise = noise_warnings([s.seconds["step"] for s in timed], use, cores=cores, threads=threads, asked=plan.steps)
    warnings = (*noise, *_not_applied(timed))
    # In its first step the recorder finds out what it needs to know of each operation.
    traces = tuple(recording.recorder.traces()[1:])
    return Measurement(tuple(timed), tuple(recording.steps[1:]), traces, forward_s, warnings, bool(stop.reason))


class _Recording:
    """Runs steps under the recorder, whose hooks are gone in between."""

    def __init__(self, real: RealStep, timer: PhaseTimer) -> None:
        self.recorder = OperationRecorder(_clock(real.device))
        self.steps: list[TimedStep] = []
        self._real, self._timer = real, timer

    def step(self) -> None:
        """One more."""
        step, recorder = self._real.step, self.recorder
        step.announcer.instruments.append(recorder)
        with recorder.watching(step.model), recorder:
            outcome = self._real.run()
        step.announcer.instruments.remove(recorder)
        self.steps.append(TimedStep(without_inner(self._timer.collect()), outcome.weight, outcome.applied))


def _spread(plan: Plan) -> list[int]:
    """After which steps, counted from 1 with the warm-up, there is a recorded one: the last of the warm-up (or the
    first of all), whose record is not kept, and evenly over the timed ones."""
    if not plan.recorded:
        return []
    evenly = [plan.warmup + max(plan.steps * (turn + 1) // plan.recorded, 1) for turn in range(plan.recorded)]
    return [max(plan.warmup, 1), *evenly]


def _clock(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else time.perf_counter


def _bare_forward_s(real: RealStep) -> float:
    """The median of a few, the first of which does not count."""
    step, count = real.step, real.micro_batches
    batches = [step.workload.batch(real.generator) for _ in range(count)]

    def forwards() -> None:
        with torch.no_grad(), step.precision.autocast():
            for batch in batches:
                step.workload.loss(step.model, batch)
        if real.device.type == "cuda":
            torch.cuda.synchronize(real.device)

    forwards()
    return statistics.median(_seconds(forwards) for _ in range(_FORWARDS))


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _not_applied(timed: list[TimedStep]) -> list[str]:
    skipped = sum(not step.applied for step in timed)
    if not skipped:
        return []
    return [
        f"{skipped} of {len(timed)} timed steps updated nothing, as their loss or gradient was not finite, and count"
        " 0 s in the optimizer: let a loss scale settle in more warm-up steps, or choose another precision.mode"
    ]
