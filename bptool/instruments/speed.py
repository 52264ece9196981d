"""Throughput and utilisation of each step, from its phase times."""

from __future__ import annotations

from dataclasses import dataclass, field

from bptool.hardware import PeakRate
from bptool.instruments.phase_timer import PhaseTimer


@dataclass
class SpeedGauge:
    """Turns each step's phase times into the `perf/*` scalars, and remembers them.

    Args:
        flops_per_unit: model FLOPs of one unit (token), forward and backward; None where they are not known.
    """

    timer: PhaseTimer
    peak: PeakRate
    flops_per_unit: float | None
    step_s: list[float] = field(default_factory=list)
    units_per_s: list[float] = field(default_factory=list)
    backward_over_forward: list[float] = field(default_factory=list)

    def read(self, units: int) -> dict[str, float]:
        """The scalars of the step that was just timed, which counted `units` (tokens)."""
        seconds = self.timer.collect()
        rate = units / seconds["step"]
        ratio = (seconds["backward"] - seconds.get("recompute", 0.0)) / seconds["forward"]
        self.step_s.append(seconds["step"])
        self.units_per_s.append(rate)
        self.backward_over_forward.append(ratio)
        scalars = {"perf/tokens_per_s": rate, "perf/backward_over_forward": ratio}
        mfu = self.mfu(rate)
        return scalars if mfu is None else {**scalars, "perf/mfu": mfu}

    def mfu(self, rate: float) -> float | None:
        """Model FLOPs utilisation at `rate` units a second; None where FLOPs or peak are unknown."""
        if self.flops_per_unit is None or self.peak.flops_per_s is None:
            return None
        return rate * self.flops_per_unit / self.peak.flops_per_s
