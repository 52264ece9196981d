"""A row's steps in earnest: their times, their losses, and the peak of one of them."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bptool.analysis.activation_budget.planning import with_plan
from bptool.analysis.compare.entries import TimedPhases
from bptool.analysis.compare.job import Outcome
from bptool.analysis.compare.same_start import data_of, with_shared_weights
from bptool.analysis.profile.timing import TimedStep, time_steps
from bptool.analysis.question import Question
from bptool.analysis.real_step import RealStep
from bptool.hardware import resolve_device
from bptool.instruments.memory.peak import PeakMemory
from bptool.instruments.phase_timer import PhaseTimer
from bptool.training.compiling import recomputes_unseen
from bptool.training.step import StepOutcome


def timed_run(question: Question, folder: Path, *, warmup: int, steps: int) -> Outcome:
    """The figures of a `RowRun`.

    The last step of the warm-up, at least the second of all, is the one whose memory is measured, which slows it down
    on a CPU.

    Raises:
        BptoolError: the step cannot be run here.
    """
    assert warmup >= 2, "the first step is not a steady one, and the measured one is not to be timed"
    device = resolve_device(question.machine.device)
    question = with_shared_weights(with_plan(question), device)
    source, note = data_of(question, device, folder)
    timer = PhaseTimer(device)
    real = RealStep(question, timer, source=source)
    peak = PeakMemory(device, real.step.persistent_tensors, measured_step=warmup - 1)
    real.step.announcer.instruments.insert(0, peak)  # outermost, so that its own work is not timed
    losses: list[float] = []

    def run() -> StepOutcome:
        if len(losses) in (0, warmup - 1):
            gc.collect()  # what is released in the measured step must have come in it
        outcome = real.run()
        losses.append(outcome.loss)
        return outcome

    timed = time_steps(run, timer, warmup=warmup, steps=steps, stop=_Never())
    unseen = recomputes_unseen(question.config)
    notes = [note] if note else []
    notes += ["recomputation is compiled into the backward, and timed with it"] if unseen else []
    phases = [_phases(step, None if unseen else 0.0).model_dump() for step in timed]
    figures: dict[str, Any] = {"peak_bytes": peak.peak_bytes, "steps": phases, "losses": losses}
    return Outcome(figures=figures, notes=notes)


@dataclass
class _Never:
    """Nobody stops a row's process but by ending it."""

    reason: str = ""


def _phases(step: TimedStep, otherwise: float | None) -> TimedPhases:
    """Of a step; `otherwise` is the recomputation's time where it was no phase of its own."""
    return TimedPhases(
        step_s=step.seconds["step"],
        forward_s=step.seconds["forward"],
        recompute_s=step.seconds.get("recompute", otherwise),
        backward_s=step.seconds["backward"],
        units=step.units,
    )
