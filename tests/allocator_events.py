"""The CPU allocator's own account of real operations, and where a memory ledger first departs from it."""

from __future__ import annotations

import gc
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from small_runs import CPU, run_steps
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from bptool.analysis.machine import FakeTensors
from bptool.config.schema import Config
from bptool.instruments.memory.cpu_scratch import CpuScratch
from bptool.instruments.memory.ledger import MemoryLedger
from bptool.instruments.memory.peak import PeakMemory, highest_sum
from bptool.instruments.memory.trace import MemoryTrace
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.workload import Workload

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes notes to stderr otherwise


def measured_peak(config: Config, workload: Workload) -> int:
    """The allocator's peak in the second real step, which begins with the optimizer's state in place."""
    gc.collect()  # what goes in the measured step must have come in it: the profiler's memory of older blocks is stale
    step = build_step(config, workload, CPU, Announcer())
    memory = PeakMemory(CPU, step.persistent_tensors)
    step.announcer.instruments.append(memory)
    run_steps(step, 2, config.training.gradient_accumulation_steps)
    assert memory.peak_bytes is not None
    return memory.peak_bytes


def predicted(config: Config, workload: Workload, ledger: MemoryLedger | None = None) -> MemoryTrace:
    """What a ledger records of the same two steps on fake tensors."""
    countable = replace(workload, weight=lambda batch: 1)
    ledger = ledger or MemoryLedger(scratch=CpuScratch())
    with FakeTensors(), ledger:
        step = build_step(config, countable, CPU, Announcer([ledger]))
        with ledger.watching(step.model, step.optimizers):
            run_steps(step, 2, config.training.gradient_accumulation_steps)
    return ledger.trace()


class Operation(NamedTuple):
    """One real operation, and what the allocator did in it."""

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    changes: list[int]
    """Bytes allocated (positive) and released (negative), in order."""
    before: list[int]
    """The same, between the operation before and this one."""

    @property
    def scratch(self) -> int:
        """Most that it held besides its result."""
        return highest_sum(self.changes) - max(sum(self.changes), 0)

    def __repr__(self) -> str:
        tensors = [(str(a.dtype), list(a.shape), a.stride()) for a in self.args if isinstance(a, Tensor)]
        return f"{self.func} {tensors} {self.changes[:12]}"


def operations(action: Callable[[], object], *, keep_arguments: bool = True) -> list[Operation]:
    """Run it, and tell every operation that it asked of PyTorch."""
    spy = _Spy(keep_arguments)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler, spy:
        action()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    edges: list[tuple[int, int]] = [(0, 0)] * len(spy.calls)
    changes = []
    for event in results.events():
        name, start = event.name(), event.start_ns()
        if name == "[memory]":
            changes.append((start, event.nbytes()))
        elif name.startswith(_Spy.PREFIX):
            edges[int(name.removeprefix(_Spy.PREFIX))] = (start, start + event.duration_ns())
    return list(_shared_out(spy.calls, edges, sorted(changes, key=lambda change: change[0])))


def _shared_out(
    calls: list[tuple[Any, ...]], edges: list[tuple[int, int]], changes: list[tuple[int, int]]
) -> Iterator[Operation]:
    times = [time for time, _ in changes]
    done = 0
    for (func, args, kwargs, result), (start, end) in zip(calls, edges, strict=True):
        first, last = bisect_left(times, start), bisect_right(times, end)
        inside, before = ([n for _, n in changes[i:j]] for i, j in ((first, last), (done, first)))
        yield Operation(func, args, kwargs, result, inside, before)
        done = last


def first_departure(config: Config, workload: Workload) -> str:
    """Where the ledger's live bytes first differ from the allocator's for longer than one operation."""
    step = build_step(config, workload, CPU, Announcer())
    count = config.training.gradient_accumulation_steps
    run_steps(step, 1, count)
    real = operations(lambda: run_steps(step, 1, count), keep_arguments=False)
    ledger = _Following()
    predicted(config, workload, ledger)
    return _first_difference(real, [entry for entry in ledger.followed if entry[2].startswith("step 1,")])


def _first_difference(real: list[Operation], recorded: list[tuple[str, int, str]]) -> str:
    live, lives = 0, []
    for operation in real:
        lives.append(live + sum(operation.before))
        live = lives[-1] + sum(operation.changes)
    names = [str(operation.func) for operation in real]
    matches = SequenceMatcher(None, names, [name for name, *_ in recorded], autojunk=False).get_matching_blocks()
    pairs = [(m.a + i, m.b + i) for m in matches for i in range(m.size)]
    offset = recorded[0][1]
    for i, j in pairs:
        # A number that Python made for this very operation is there before it begins.
        surplus = lives[i] - (recorded[j][1] - offset)
        if surplus not in (0, 8):
            return f"{surplus} bytes more before {real[i]!r} ({recorded[j][2]}); since the last: {real[i].before}"
    return "nowhere but within an operation"


class _Following(MemoryLedger):
    """Keeps, of each operation, its name, the step, the phase, and the bytes that were live before it."""

    def __init__(self) -> None:
        super().__init__(scratch=CpuScratch())
        self.followed: list[tuple[str, int, str]] = []
        self._summed = self._live = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.prim.device.default:
            events = self.trace().events
            self._live += sum(event.delta for event in events[self._summed :])
            self._summed = len(events)
            where = f"step {events[-1].step}, {events[-1].phase}" if events else ""
            self.followed.append((str(func), self._live, where))
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Spy(TorchDispatchMode):
    PREFIX = "operation "

    def __init__(self, keep_arguments: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, ...]] = []
        self._keep_arguments = keep_arguments

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, kwargs = len(self.calls), kwargs or {}
        self.calls.append(())
        with record_function(f"{self.PREFIX}{number}"):
            result = func(*args, **kwargs)
        self.calls[number] = (func, args, kwargs, result) if self._keep_arguments else (func, (), {}, None)
        return result


def tracked_by_torch(config: Config, workload: Workload, *, fake: bool = True) -> int:
    """The second step's peak as PyTorch's own tracker has it, of fake or of real tensors.

    It knows no second micro-batch, and no update rule that reads a value.
    """
    with FakeTensors() if fake else nullcontext():
        step = build_step(config, replace(workload, weight=lambda batch: 1), CPU, Announcer())
        run_steps(step, 1)
        tracker = MemTracker()
        tracker.track_external(step.model, *step.optimizers.state().values())
        with tracker:
            run_steps(step, 1)
    peak: int = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    return peak
