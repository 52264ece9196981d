"""Who used this machine's cores while something was timed: this process, or others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STAT, _GROUP_STAT = Path("/proc/stat"), Path("/sys/fs/cgroup/cpu.stat")


@dataclass(frozen=True)
class CpuReading:
    """Counters at one moment, in seconds.

    Attributes:
        wall_s: of the clock.
        own_s: of this process, all its threads.
        busy_s: of all cores, all processes (and what a host took from a virtual machine); None where nobody tells.
        throttled_s: for which the control group's limit held this process back; None where nobody tells.
    """

    wall_s: float
    own_s: float
    busy_s: float | None
    throttled_s: float | None


@dataclass(frozen=True)
class CpuUse:
    """Between two readings.

    Attributes:
        others_cores: cores that others kept busy, on average.
        throttled: share of the time for which the control group's limit held this process back.
    """

    others_cores: float | None
    throttled: float | None


def read_cpu(
    clock: Callable[[], float] = time.perf_counter, own: Callable[[], float] = time.process_time
) -> CpuReading:
    """The counters now."""
    return CpuReading(clock(), own(), _busy_s(), _throttled_s())


def used_between(before: CpuReading, after: CpuReading) -> CpuUse:
    """What went on between two readings."""
    wall_s = after.wall_s - before.wall_s
    if wall_s <= 0:
        return CpuUse(None, None)
    others = throttled = None
    if before.busy_s is not None and after.busy_s is not None:
        others = max((after.busy_s - before.busy_s - (after.own_s - before.own_s)) / wall_s, 0.0)
    if before.throttled_s is not None and after.throttled_s is not None:
        throttled = (after.throttled_s - before.throttled_s) / wall_s
    return CpuUse(others, throttled)


def _busy_s() -> float | None:
    """The kernel's first line, in ticks: user, nice, system, idle, iowait, irq, softirq, steal (proc_stat(5))."""
    try:
        ticks = [int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
        idle, waiting = ticks[3], ticks[4]
    except (OSError, ValueError, IndexError):
        return None
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def _throttled_s() -> float | None:
    try:
        lines = _GROUP_STAT.read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split() for line in lines)
    return int(fields["throttled_usec"]) / 1e6 if "throttled_usec" in fields else None
