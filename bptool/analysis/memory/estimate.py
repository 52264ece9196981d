"""Will it fit? Simulate the step on the machine that is asked about, and read the record."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bptool.analysis.activation_budget.planning import Planned, settled
from bptool.analysis.machine import Machine
from bptool.analysis.memory.caching_allocator import Replay, replay, rounded_size
from bptool.analysis.memory.depth import Extended
from bptool.analysis.memory.parameters import sum_of_parameters
from bptool.analysis.memory.result import MemoryEstimate, module_bytes, readings
from bptool.analysis.memory.simulation import STEADY, WITHOUT_COMPILER, simulate_deep
from bptool.analysis.memory.sweeps import in_block
from bptool.analysis.memory.whole_first_step import with_whole_first_step
from bptool.analysis.question import Question
from bptool.config.schema import Config
from bptool.errors import BptoolError, TargetError
from bptool.gpus import Range
from bptool.hardware import resident_bytes
from bptool.instruments.memory.trace import Allocation, MemoryTrace
from bptool.training.user_code import describe
from bptool.training.workload import Workload
from bptool.units import format_bytes

_NOTHING = Range(0, 0, 0, "")
# `FakeTensorMode`'s own errors, those of tensor subclasses and of missing meta kernels, as PyTorch 2.11 to 2.13 say it.
_ASKS_FOR_VALUES = re.compile(
    r"DataDependent|DynamicOutputShape|Unsupported\w*Exception|fake ?tensor|tensor subclass|\bmeta\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Simulated:
    """A step's record, as the machine's allocator counts it.

    Attributes:
        requested: the record itself, with the sizes that the operations ask for.
        trace: the same with the sizes that the allocator gives.
        reserved_bytes: most that the allocator holds.
        depths: of the models that were simulated; empty where it was the model itself.
        fits: whether it does; None where nothing is known of the capacity.
        planned: what `activation_checkpoint.budget` came to; None where there is none.
        whole: makes `requested` with every block written out; None where they are.
    """

    requested: MemoryTrace
    trace: MemoryTrace
    reserved_bytes: int
    depths: tuple[int, ...]
    fits: bool | None
    planned: Planned | None = None
    whole: Callable[[], MemoryTrace] | None = None

    @property
    def peak_event(self) -> int:
        """The fullest instant of the steady step."""
        return self.trace.peak_event(STEADY)

    def written_out(self) -> tuple[MemoryTrace, int]:
        """`requested` with every block by itself, and its fullest instant."""
        if self.whole is None:
            return self.requested, self.peak_event
        trace = self.whole()
        return trace, trace.peak_event(STEADY)

    @property
    def peak_bytes(self) -> int:
        """What is held then."""
        return int(self.trace.live_bytes[self.peak_event])


def simulated(config: Config, workload: Workload, machine: Machine) -> Simulated:
    """Simulate a step of `config` on `machine`.

    Raises:
        TargetError: the user's model does what fake tensors cannot.
        BudgetTooSmall: `activation_checkpoint.budget` cannot be met.
    """
    step = settled(config, workload, machine)
    return replace(counted(_simulate(step.config, step.workload, machine), machine), planned=step.planned)


def counted(found: Extended, machine: Machine) -> Simulated:
    """The record with the sizes that the machine's allocator gives, and whether they fit."""
    if machine.gpu is None:
        peak = int(found.trace.live_bytes.max())
        fits = None if machine.capacity_bytes is None else peak <= machine.capacity_bytes
        return Simulated(found.trace, found.trace, peak, found.depths, fits, whole=found.write_out)
    both = with_whole_first_step(found.trace)
    done = replay(both)
    reserved = done.peak_reserved_bytes + _reserved_beyond(found, done.peak_reserved_bytes)
    fits = None
    if machine.capacity_bytes is not None:
        room = machine.capacity_bytes - machine.gpu.context.expected
        # Above the room the allocator gives back what it only caches, which may be enough; not asked of bundles.
        fits = reserved <= room or (found.beyond is None and room > 0 and replay(both, room).refusal is None)
    in_blocks = found.trace.resized(_block_sizes(found.trace, done).__getitem__)
    return Simulated(found.trace, in_blocks, reserved, found.depths, fits, whole=found.write_out)


def _block_sizes(trace: MemoryTrace, done: Replay) -> list[int]:
    """What the allocator gives each allocation; of many together, on average what it gives like ones."""
    sizes = [
        done.block_bytes.get(i, a.count * rounded_size(a.n_bytes // a.count)) for i, a in enumerate(trace.allocations)
    ]
    together = [i for i, a in enumerate(trace.allocations) if a.blocks is not None]
    if together:
        like: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
        for i, a in enumerate(trace.allocations):
            if a.blocks is None:
                like[_kind(a)].append(sizes[i])
        for i in together:
            one = trace.allocations[i]
            sizes[i] = one.count * sum(like[_kind(one)]) // len(like[_kind(one)])
    return sizes


def _kind(a: Allocation) -> tuple[object, ...]:
    """What allocations have in common that like blocks make at the same place."""
    return a.n_bytes // a.count, a.category, a.op, a.phase, in_block(a.module, 0)


def _reserved_beyond(found: Extended, reserved_bytes: int) -> int:
    """What the allocator reserves for blocks in bundles, by what it does for as many that are written out."""
    if found.beyond is None:
        return 0
    shorter = replay(with_whole_first_step(found.beyond.shorter)).peak_reserved_bytes
    return (reserved_bytes - shorter) * found.beyond.left_out // found.beyond.periods


def estimate(question: Question, step: Simulated) -> MemoryEstimate:
    """The record's answers; what else can be asked is left empty."""
    workload, machine = question.workload, question.machine
    read = readings(step.trace)
    overhead = machine.gpu.context if machine.gpu else _NOTHING
    peak = step.peak_bytes
    return MemoryEstimate.model_validate(
        {
            **read,
            # As asked for: what an allocator adds here and there would make like modules differ.
            "modules": module_bytes(step.requested),
            "target": question.target,
            "settings": list(question.settings),
            "device": machine.device,
            "gpu": machine.gpu.name if machine.gpu else None,
            "parameters_count": sum_of_parameters(workload, torch.Tensor.numel, torch.float32),
            "trainable_parameters_count": sum_of_parameters(
                workload, lambda p: p.numel() if p.requires_grad else 0, torch.float32
            ),
            "peak_reserved_bytes": step.reserved_bytes,
            "overhead_bytes": overhead.expected,
            "total_low_bytes": peak + overhead.low,
            "total_expected_bytes": step.reserved_bytes + overhead.expected,
            "total_high_bytes": step.reserved_bytes + overhead.high,
            "capacity_bytes": machine.capacity_bytes,
            "fits": step.fits,
            "extrapolated_from_layers": list(step.depths),
            "assumptions": list(_assumptions(question, step, overhead)),
        }
    )


def _simulate(config: Config, workload: Workload, machine: Machine) -> Extended:
    try:
        return simulate_deep(config, workload, machine)
    except BptoolError:
        raise
    except Exception as error:
        if not config.run.workload:
            raise
        raise _refusal(config.run.workload, error, fake=machine.fake) from error


def _refusal(workload: str, error: Exception, *, fake: bool) -> TargetError:
    """The user's error, where it is one, or what their model asked of tensors without values."""
    if fake and _ASKS_FOR_VALUES.search(f"{type(error).__name__}: {error}"):
        return TargetError(
            f"{workload} does not run on fake tensors, which have shapes and no values: {describe(error)}",
            "a model that reads values in its forward can be measured on a small input: add --validate",
        )
    only_here = "; if it happens only here, where tensors have no values, add --validate" if fake else ""
    return TargetError(f"{workload} raised {describe(error)}", f"fix it there, then run again{only_here}")


def _assumptions(question: Question, step: Simulated, overhead: Range) -> list[str]:
    machine, config = question.machine, question.config
    sentences = [*question.assumptions, *machine.assumptions]
    if step.depths:
        low, high, check = step.depths
        known = f"{low} and {high}, and so do {check}, as simulating them showed"
        sentences.append(f"{question.workload.n_layers} layers follow from {known}")
    if machine.gpu and step.whole:
        sentences.append(
            "reserved is extended from two lesser depths that were replayed: it grows nearly in a straight line"
        )
    if step.planned:
        sentences.append(step.planned.sentence)
    if config.training.compile:
        sentences.append(WITHOUT_COMPILER)
    if machine.gpu:
        sentences.append(f"outside of the allocator: {overhead.source}")
        sentences.append("reserved: PyTorch's caching allocator, replayed; expandable segments would reserve less")
    else:
        unknown = ", ".join(sorted(machine.cpu_scratch.uncounted))
        if unknown:
            sentences.append(f"not counted: what these kernels allocate and free for themselves: {unknown}")
        sentences.append(f"not counted: this process itself, {format_bytes(resident_bytes())} with PyTorch loaded")
    return sentences
