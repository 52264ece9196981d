"""How long each phase of the real step takes: nothing but a timer inside."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bptool.analysis.profile.result import FiniteDifferences, PhaseTimes
from bptool.analysis.profile.statistics import duration, median_interval
from bptool.instruments.phase_timer import PhaseTimer
from bptool.training.instrument import Phase
from bptool.training.step import StepOutcome


class Stop(Protocol):
    """What says whether the user wants to stop: the name of the signal that asked, or nothing."""

    reason: str


@dataclass(frozen=True)
class TimedStep:
    """One step.

    Attributes:
        seconds: by phase, without the phases inside it, all micro-batches together; `step` is the whole.
        units: what it worked off, such as tokens.
        applied: whether it updated the parameters.
    """

    seconds: Mapping[Phase, float]
    units: int
    applied: bool = True


def time_steps(
    run: Callable[[], StepOutcome],
    timer: PhaseTimer,
    *,
    warmup: int,
    steps: int,
    stop: Stop,
    done: Callable[[int, int], None] = lambda number, total: None,
) -> list[TimedStep]:
    """Run `warmup` steps, which are not kept, and `steps` timed ones; fewer where `stop` asks for it.

    Args:
        run: one step, whose phases `timer` is told of.
        done: told after each step how many are, of how many.
    """
    timed: list[TimedStep] = []
    for number in range(warmup + steps):
        if stop.reason:
            break
        outcome = run()
        seconds = timer.collect()
        if number >= warmup:
            timed.append(TimedStep(without_inner(seconds), outcome.weight, outcome.applied))
        done(number + 1, warmup + steps)
    return timed


def without_inner(seconds: Mapping[Phase, float]) -> dict[Phase, float]:
    """A timer's readings with the recomputation taken out of the backward that it lies in."""
    own = dict(seconds)
    if "recompute" in own and "backward" in own:
        own["backward"] -= own["recompute"]
    return own


def phase_times(steps: Sequence[TimedStep]) -> PhaseTimes:
    """The phases' figures over at least one step; a step that was not applied had no optimizer, and counts 0 there."""

    def samples(phase: Phase) -> list[float]:
        return [step.seconds.get(phase, 0.0) for step in steps]

    ratios = [step.seconds["backward"] / step.seconds["forward"] for step in steps]
    low, high = median_interval(ratios)
    recomputes = any("recompute" in step.seconds for step in steps)
    return PhaseTimes(
        step=duration(samples("step")),
        data=duration(samples("data")),
        forward=duration(samples("forward")),
        recompute=duration(samples("recompute")) if recomputes else None,
        backward=duration(samples("backward")),
        clip=duration(samples("clip")),
        optimizer=duration(samples("optimizer")),
        backward_over_forward=statistics.median(ratios),
        backward_over_forward_low=low,
        backward_over_forward_high=high,
    )


def units_per_s(steps: Sequence[TimedStep]) -> float:
    """Units (tokens) a second: the median of the steps' rates."""
    return statistics.median(step.units / step.seconds["step"] for step in steps)


def utilisation(flops_per_step: float, step_s: float, peak_flops_per_s: float | None) -> float | None:
    """The share of the peak rate that so many FLOPs a step are; None where no peak is known."""
    return flops_per_step / step_s / peak_flops_per_s if peak_flops_per_s else None


def finite_differences(times: PhaseTimes, forward_s: float, parameters: int) -> FiniteDifferences:
    """What backpropagation saves.

    Args:
        times: of the real step.
        forward_s: of a forward of all the step's micro-batches that keeps nothing for a backward.
        parameters: the trained ones, P. A central difference takes two forwards for each (Nocedal & Wright, Numerical
            Optimization, section 8.1).

    The gradients' time is what the step's forward, recomputation and backward take beyond such a forward: the fused
    loss computes gradients in the forward already.
    """
    recompute = times.recompute.median_s if times.recompute else 0.0
    gradients_s = times.forward.median_s + recompute + times.backward.median_s - forward_s
    return FiniteDifferences(
        parameters_count=parameters,
        gradients_s=gradients_s,
        forward_s=forward_s,
        forwards=gradients_s / forward_s,
        finite_differences_s=2 * parameters * forward_s,
    )
