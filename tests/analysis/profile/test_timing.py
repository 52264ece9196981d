from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from bptool.analysis.profile.timing import (
    TimedStep,
    finite_differences,
    phase_times,
    time_steps,
    units_per_s,
    utilisation,
)
from bptool.instruments.phase_timer import PhaseTimer
from bptool.training.instrument import Phase
from bptool.training.step import StepOutcome

CPU = torch.device("cpu")


class Clock:
    """Goes on when told."""

    def __init__(self) -> None:
        self.now = 1000.0  # not at zero: a reading is no duration

    def __call__(self) -> float:
        return self.now


@dataclass
class Stop:
    reason: str = ""


@dataclass(frozen=True)
class Script:
    """Seconds that the phases of one step take; each micro-batch's forward, recompute and backward alike."""

    data: float = 1
    forward: float = 10
    recompute: float = 5
    backward: float = 20  # without the recomputation
    clip: float = 2
    optimizer: float | None = 3
    micro_batches: int = 1
    rest: float = 0.5  # outside of all phases

    def run(self, timer: PhaseTimer, clock: Clock) -> StepOutcome:
        def spend(name: Phase, seconds: float) -> None:
            with timer.phase(name):
                clock.now += seconds

        with timer.phase("step"):
            spend("data", self.data)
            for _ in range(self.micro_batches):
                spend("forward", self.forward)
                with timer.phase("backward"):
                    clock.now += self.backward / 2
                    if self.recompute:
                        spend("recompute", self.recompute)
                    clock.now += self.backward / 2
            spend("clip", self.clip)
            if self.optimizer is not None:
                spend("optimizer", self.optimizer)
            clock.now += self.rest
        return StepOutcome(1.0, 1.0, 0.1, 64 * self.micro_batches, self.optimizer is not None, True)


def timed(*scripts: Script, warmup: int = 0, stop_after: int | None = None) -> list[TimedStep]:
    clock, stop = Clock(), Stop()
    timer = PhaseTimer(CPU, clock)
    remaining = list(scripts)

    def run() -> StepOutcome:
        if len(scripts) - len(remaining) + 1 == stop_after:
            stop.reason = "SIGINT"
        return remaining.pop(0).run(timer, clock)

    return time_steps(run, timer, warmup=warmup, steps=len(scripts) - warmup, stop=stop)


class TestOneStep:
    def test_each_phase_without_those_inside_it(self) -> None:
        (step,) = timed(Script())
        assert step.seconds == {
            "data": 1,
            "forward": 10,
            "recompute": 5,
            "backward": 20,  # 25 by the timer, 5 of which are the recomputation's
            "clip": 2,
            "optimizer": 3,
            "step": 1 + 10 + 25 + 2 + 3 + 0.5,
        }

    def test_micro_batches_are_summed(self) -> None:
        (step,) = timed(Script(micro_batches=3))
        assert (step.seconds["forward"], step.seconds["recompute"], step.seconds["backward"]) == (30, 15, 60)
        assert step.units == 192

    def test_nothing_is_recomputed(self) -> None:
        times = phase_times(timed(Script(recompute=0)))
        assert times.recompute is None
        assert times.backward.median_s == 20


class TestPhaseTimes:
    def test_figures_over_the_steps(self) -> None:
        """Forwards of 10, 20 and 40 s beside backwards of 20: ratios 2, 1 and 0.5."""
        times = phase_times(timed(*(Script(forward=forward) for forward in (10, 20, 40))))
        assert times.forward.samples_s == [10, 20, 40]
        assert times.forward.median_s == 20
        assert times.backward_over_forward == 1
        assert (times.backward_over_forward_low, times.backward_over_forward_high) == (0.5, 2)
        assert times.step.samples_s == [41.5, 51.5, 71.5]
        assert (times.data.median_s, times.clip.median_s, times.optimizer.median_s) == (1, 2, 3)

    def test_the_ratio_is_the_median_of_the_steps_ratios(self) -> None:
        """Ratios 2, 1 and 3; that of the medians would be 20 / 20."""
        scripts = [Script(forward=f, backward=b) for f, b in ((10, 20), (20, 20), (40, 120))]
        assert phase_times(timed(*scripts)).backward_over_forward == 2

    def test_with_many_steps_the_extremes_are_not_in_the_interval(self) -> None:
        """Nine ratios: one is left out at either end."""
        times = phase_times(timed(*(Script(backward=10 * ratio) for ratio in range(1, 10))))
        assert times.backward_over_forward == 5
        assert (times.backward_over_forward_low, times.backward_over_forward_high) == (2, 8)

    def test_a_step_that_was_not_applied(self) -> None:
        times = phase_times(timed(Script(), Script(optimizer=None)))
        assert times.optimizer.samples_s == [3, 0]


class TestWhichSteps:
    def test_warm_up_is_not_kept(self) -> None:
        steps = timed(Script(forward=99), Script(forward=98), Script(), warmup=2)
        assert [step.seconds["forward"] for step in steps] == [10]

    def test_what_was_gathered_before_ctrl_c_is_kept(self) -> None:
        """It comes in the fourth step, which is the third timed one and is finished."""
        assert len(timed(*[Script()] * 9, warmup=1, stop_after=4)) == 3

    def test_ctrl_c_in_the_warm_up(self) -> None:
        assert timed(*[Script()] * 9, warmup=3, stop_after=2) == []

    def test_progress_is_told(self) -> None:
        told: list[tuple[int, int]] = []
        clock = Clock()
        timer = PhaseTimer(CPU, clock)

        def run() -> StepOutcome:
            return Script().run(timer, clock)

        def done(number: int, total: int) -> None:
            told.append((number, total))

        time_steps(run, timer, warmup=1, steps=2, stop=Stop(), done=done)
        assert told == [(1, 3), (2, 3), (3, 3)]


class TestRates:
    def test_throughput_is_that_of_the_median_step(self) -> None:
        """64 tokens in steps of 41.5, 81.5 and 51.5 s."""
        steps = timed(Script(), Script(forward=50), Script(forward=20))
        assert units_per_s(steps) == pytest.approx(64 / 51.5)

    def test_utilisation(self) -> None:
        """30 GFLOP in 2 s are 15 GFLOP/s, of 60."""
        assert utilisation(30e9, 2.0, 60e9) == 0.25
        assert utilisation(30e9, 2.0, None) is None


class TestFiniteDifferences:
    def test_two_forwards_for_each_parameter(self) -> None:
        """Forward 10, recompute 5 and backward 20 s, where a bare forward takes 8: the gradients took 27."""
        found = finite_differences(phase_times(timed(Script())), forward_s=8, parameters=1000)
        assert found.gradients_s == 27
        assert found.forwards == 27 / 8
        assert found.finite_differences_s == 2 * 1000 * 8
        assert (found.forward_s, found.parameters_count) == (8, 1000)

    def test_without_recomputation(self) -> None:
        assert finite_differences(phase_times(timed(Script(recompute=0))), 10, 1).gradients_s == 20
