from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bptool.hardware import PeakRate
from bptool.instruments.phase_timer import PhaseTimer
from bptool.instruments.speed import SpeedGauge

CPU = torch.device("cpu")


def clock_of(*readings: float) -> Callable[[], float]:
    remaining = iter(readings)
    return lambda: next(remaining)


class TestPhaseTimer:
    def test_a_phase_holds_those_inside_it_and_repeated_ones_add_up(self) -> None:
        """Readings in the order in which the clock is looked at: begin and end of each phase."""
        timer = PhaseTimer(CPU, clock_of(1000, 1001, 1003, 1010, 1012, 1017, 1020, 1021, 1024, 1030))
        with timer.phase("step"):
            with timer.phase("forward"):
                pass
            with timer.phase("backward"), timer.phase("recompute"):
                pass
            with timer.phase("forward"):
                pass
        assert timer.collect() == {"step": 30, "forward": 2 + 3, "backward": 10, "recompute": 5}

    def test_what_was_collected_is_gone(self) -> None:
        timer = PhaseTimer(CPU, clock_of(1, 2, 5, 9))
        with timer.phase("clip"):
            pass
        assert timer.collect() == {"clip": 1}
        assert timer.collect() == {}
        with timer.phase("clip"):
            pass
        assert timer.collect() == {"clip": 4}

    def test_a_phase_that_fails_is_timed_too(self) -> None:
        timer = PhaseTimer(CPU, clock_of(1, 8))
        with pytest.raises(ZeroDivisionError), timer.phase("forward"):
            raise ZeroDivisionError
        assert timer.collect() == {"forward": 7}


def gauge(flops_per_unit: float | None, peak: float | None, *readings: float) -> SpeedGauge:
    """Of one step: 2 s of forward, then a backward of which some is recomputation."""
    timer = PhaseTimer(CPU, clock_of(*readings))
    with timer.phase("step"):
        with timer.phase("forward"):
            pass
        with timer.phase("backward"), timer.phase("recompute"):
            pass
    return SpeedGauge(timer, PeakRate(peak, "a test"), flops_per_unit)


class TestSpeedGauge:
    READINGS = (100.0, 100.0, 102.0, 102.0, 102.0, 104.0, 109.0, 110.0)
    """Step 10 s, forward 2 s, backward 7 s, of which 2 s are recomputation."""

    def test_the_figures_by_hand(self) -> None:
        speed = gauge(6e6, 1e9, *self.READINGS)
        scalars = speed.read(400)
        assert scalars == {
            "perf/tokens_per_s": 40.0,
            "perf/backward_over_forward": 2.5,  # (7 - 2) / 2: recomputation is no part of it
            "perf/mfu": 0.24,  # 40 tokens/s x 6 MFLOP of 1 GFLOP/s
        }
        assert (speed.step_s, speed.units_per_s, speed.backward_over_forward) == ([10.0], [40.0], [2.5])
        assert speed.mfu(100.0) == 0.6

    @pytest.mark.parametrize(("flops", "peak"), [(None, 1e9), (6e6, None), (None, None)])
    def test_an_mfu_that_cannot_be_known_is_not_told(self, flops: float | None, peak: float | None) -> None:
        speed = gauge(flops, peak, *self.READINGS)
        assert speed.mfu(40.0) is None
        assert speed.read(400).keys() == {"perf/tokens_per_s", "perf/backward_over_forward"}

    def test_each_step_has_its_own_figures(self) -> None:
        timer = PhaseTimer(CPU, clock_of(0, 0, 1, 1, 3, 4, 10, 10, 14, 14, 18, 20))
        speed = SpeedGauge(timer, PeakRate(None, ""), None)
        for _ in range(2):
            with timer.phase("step"):
                with timer.phase("forward"):
                    pass
                with timer.phase("backward"):
                    pass
            speed.read(20)
        assert speed.units_per_s == [5.0, 2.0]
        assert speed.backward_over_forward == [2.0, 1.0]
