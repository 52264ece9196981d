"""What this machine has: devices, memory, peak arithmetic rates, and the allocator's settings.

Torch is imported inside the functions that need it, so that the command line can read this file's constants at once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from bptool.errors import DeviceError
from bptool.gpus import gpu_reporting

if TYPE_CHECKING:
    import torch

_STANDING_IN: ContextVar[bool] = ContextVar("standing_in_for_cuda", default=False)
_MEMINFO, _CPUINFO, _CONTROL_GROUP = Path("/proc/meminfo"), Path("/proc/cpuinfo"), Path("/sys/fs/cgroup")
_RATE_OF_MODE = {"fp32": "fp32", "tf32": "tf32", "bf16-mixed": "bf16", "bf16": "bf16", "fp16-mixed": "bf16"}


@dataclass(frozen=True)
class PeakRate:
    """The arithmetic rate that utilisation is a share of.

    Attributes:
        flops_per_s: FLOP/s, a multiply-add being two; None where nothing is known.
        source: how it is known.
    """

    flops_per_s: float | None
    source: str


@contextmanager
def standing_in_for_cuda_tensors() -> Iterator[None]:
    """While entered, code that asks `acts_as_cuda` does with CPU tensors what it would do with CUDA's."""
    token = _STANDING_IN.set(True)
    try:
        yield
    finally:
        _STANDING_IN.reset(token)


def acts_as_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor is CUDA's, or stands in for one in a simulation; ask this instead of `is_cuda`."""
    return tensor.is_cuda or _STANDING_IN.get()


def resolve_device(name: str) -> torch.device:
    """The device that `training.device` names; `auto` is a GPU where there is one.

    Raises:
        DeviceError: it is not there, or is no device's name.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"training.device = '{name}' is no device's name", "use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DeviceError(f"training.device = '{name}' is not supported", "use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        there = f"{count} CUDA device(s)" if count else "no CUDA device"
        raise DeviceError(f"training.device = '{name}', but this machine has {there}", "use training.device=cpu")
    return device


def peak_rate(device: torch.device, mode: str) -> PeakRate:
    """The rate that MFU is a share of: measured on a CPU, from the data sheet on a known GPU, else unknown.

    Args:
        mode: `precision.mode`.
    """
    if device.type == "cpu":
        rate = measured_matmul_rate(mode)
        return PeakRate(rate, f"this machine's measured {mode.removesuffix('-mixed')} matmul rate")
    import torch

    name = torch.cuda.get_device_name(device)
    gpu = gpu_reporting(name)
    if gpu is None:
        return PeakRate(None, f"no peak is known for '{name}'")
    return PeakRate(gpu.flops_per_s[_RATE_OF_MODE[mode]], f"{name} data sheet, dense")


def measured_matmul_rate(
    mode: str,
    *,
    sizes: Sequence[int] = (512, 1024, 2048),
    seconds: float = 0.6,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The best FLOP/s of a square matrix product on the CPU, in the format that `precision.mode` multiplies in.

    The best of several is what the machine can do when nothing disturbs it, which is what a peak is. Small ones, of a
    millisecond, are over before another process is given the core; large ones keep many cores busy.
    """
    import torch

    dtypes = {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "fp16-mixed": torch.float16}
    dtype = dtypes.get(mode, torch.float32)
    shrunk = 8 if dtype == torch.float16 else 1  # many CPUs emulate it

    def rate(size: int) -> float:
        left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        return 2 * size**3 / best_seconds(lambda: torch.matmul(left, right, out=out), seconds / len(sizes), clock)

    return max(rate(size // shrunk) for size in sizes)


def measured_memory_bandwidth(
    *,
    n_bytes: int = 2**27,
    part_bytes: int = 2**22,
    seconds: float = 0.6,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Bytes/s of `a = b + 3 c` over parts of arrays of `n_bytes` each, which no cache should hold.

    The triad of STREAM (McCalpin 1995), counted as there: two arrays are read and one is written, and that a CPU reads
    a line before it writes to it is not counted. A part is over before another process is given the core.
    """
    import torch

    arrays = [torch.ones(n_bytes // 4) for _ in range(3)]
    parts = cycle(zip(*(array.split(part_bytes // 4) for array in arrays), strict=True))

    def add_a_part() -> None:
        left, right, out = next(parts)
        torch.add(left, right, alpha=3.0, out=out)

    return 3 * min(part_bytes, n_bytes) / typical_seconds(add_a_part, seconds, clock)


def measured_operation_overhead(*, seconds: float = 0.2, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that an operation takes on the CPU where there is hardly anything to compute: PyTorch's own work.

    The mean over batches of 100 in a training's forward (autograd records them), the median of several batches.
    """
    import torch

    x = torch.ones(1, requires_grad=True)

    def batch() -> None:
        y = x
        for _ in range(100):
            y = y * 1.0

    return typical_seconds(batch, seconds, clock) / 100


def best_seconds(action: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """The shortest of as many runs as fit into `seconds`, at least one: what the machine can do undisturbed."""
    return min(_runs(action, seconds, clock))


def typical_seconds(action: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """The median of as many runs as fit into `seconds`, at least one: what a step in the midst of others gets."""
    return statistics.median(_runs(action, seconds, clock))


def _runs(action: Callable[[], object], seconds: float, clock: Callable[[], float]) -> list[float]:
    """What each run takes, after one that does not count."""
    action()
    taken: list[float] = []
    start = clock()
    while clock() - start < seconds or not taken:
        before = clock()
        action()
        taken.append(clock() - before)
    return taken


def available_memory_bytes(device: torch.device) -> int:
    """Bytes that a run may still take: free device memory, or what the kernel and the control group leave."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    limits = [_meminfo_available(), _control_group_left()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else sys.maxsize


def cpu_name() -> str:
    """The processor's name, or only its kind where the kernel tells no more."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine() or "CPU"


def resident_bytes() -> int:
    """What this process holds in memory now, or the most that it ever held where the kernel tells no more."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def tune_cpu_allocator() -> None:
    """Have glibc keep freed memory instead of giving it back to the kernel.

    By default every large tensor is mapped afresh and page-faulted in at each step; with these thresholds the heap is
    reused, which makes a GPT-2 124M step on a CPU about 1.5x faster. Elsewhere than under glibc it does nothing.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def _meminfo_available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        page_size, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        return page_size * pages
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _control_group_left() -> int | None:
    """Limit less usage of this process's cgroup (v2); None where there is no limit.

    Usage counts the files that the kernel keeps in memory as long as nobody needs it; those are not in the way.
    """
    try:
        limit, used, stat = ((_CONTROL_GROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:
        return None
    cached = dict(line.split() for line in stat.splitlines()).get("inactive_file", 0)
    return None if limit.strip() == "max" else int(limit) - int(used) + int(cached)
