"""What makes measured times doubtful, and what to do about it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from bptool.analysis.profile.statistics import FEWEST, duration
from bptool.instruments.cpu_use import CpuUse

WIDE = 1.25
"""Ratio of the ninetieth percentile to the tenth above which steps are said to vary; an idle machine's is below 1.1."""
SLOWING = 1.1
"""Ratio of the later half's median to the earlier half's above which the machine is said to slow down."""
MANY = 10


def noise_warnings(step_s: Sequence[float], use: CpuUse, *, cores: int, threads: int, asked: int) -> list[str]:
    """Sentences, each with its remedy; none where no step was timed.

    Args:
        step_s: seconds of each timed step, in order.
        use: of the CPU while they ran.
        cores: this machine's; threads: those that PyTorch computes with.
        asked: how many steps were to be timed.
    """
    if not step_s:
        return []
    return [*_few(len(step_s), asked), *_spread(step_s), *_others(use, cores, threads), *_throttled(use, step_s)]


def _few(count: int, asked: int) -> Iterator[str]:
    if count < FEWEST:
        remedy = "let it run to its end" if count < asked else f"time more of them: --steps {MANY}"
        yield (
            f"{_steps(count)} timed: fewer than {FEWEST} give no 95% interval, and this one is their range; {remedy}"
        )


def _spread(step_s: Sequence[float]) -> Iterator[str]:
    if len(step_s) < 2:
        return
    found = duration(step_s)
    if found.p90_s > WIDE * found.p10_s:
        yield (
            f"steps took between {found.p10_s:.3g} and {found.p90_s:.3g} s (tenth and ninetieth percentile):"
            f" stop what else runs here, or time more of them: --steps {max(3 * len(step_s), 30)}"
        )


def _others(use: CpuUse, cores: int, threads: int) -> Iterator[str]:
    """Idle cores that this process does not use may be used by others."""
    spare = cores - threads
    if use.others_cores is not None and use.others_cores > spare + 0.1 * threads:
        left = max(1, round(cores - use.others_cores))
        yield (
            f"other processes kept {use.others_cores:.1f} of {cores} cores busy, and this one computes with {threads}"
            f" threads: stop them, or leave them their cores (OMP_NUM_THREADS={left})"
        )


def _throttled(use: CpuUse, step_s: Sequence[float]) -> Iterator[str]:
    if use.throttled is not None and use.throttled > 0.01:
        yield (
            f"the control group's CPU limit held this process back for {use.throttled:.0%} of the time:"
            " raise the limit, or compute with fewer threads (OMP_NUM_THREADS)"
        )
    half = len(step_s) // 2
    if half < 3:
        return
    slower = statistics.median(step_s[-half:]) / statistics.median(step_s[:half])
    if slower > SLOWING:
        yield (
            f"the later steps took {slower - 1:.0%} longer than the earlier ones, as a CPU does that grows hot or has"
            " used up its burst: let it cool down, and compare runs only at the same temperature"
        )


def _steps(count: int) -> str:
    return "1 step was" if count == 1 else f"{count} steps were"
