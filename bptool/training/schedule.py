"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from bptool.config.schema import ScheduleSettings


def learning_rate(step: int, *, peak: float, total_steps: int, schedule: ScheduleSettings) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Linear warm-up reaches `peak` at step `warmup_steps` - 1; the shape that follows ends at
    `final_lr_fraction * peak` on the run's last step. A run shorter than its warm-up is all warm-up.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    return peak * _shape(step, total_steps, schedule)


def _shape(step: int, total_steps: int, schedule: ScheduleSettings) -> float:
    """Fraction of the peak after the warm-up."""
    if schedule.name == "constant":
        return 1.0
    final, last = schedule.final_lr_fraction, total_steps - 1
    decay_steps = max(total_steps - schedule.warmup_steps, 1)
    if schedule.name == "wsd":  # a decay longer than what the warm-up leaves would begin with a fall
        decay_steps = min(decay_steps, max(round(schedule.decay_fraction * total_steps), 1))
    progress = min(max((step - (last - decay_steps)) / decay_steps, 0.0), 1.0)
    if schedule.name == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (1 - final) * progress
