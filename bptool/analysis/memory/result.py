"""Will it fit, what fills the memory, when and where? The record of a simulated step, read as answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import ClassVar

from pydantic import Field

from bptool.analysis.closed_forms.explanation import Explanation
from bptool.analysis.memory.depth import modules_of
from bptool.analysis.memory.simulation import STEADY, first_step_peak
from bptool.analysis.memory.snapshot_diff import SnapshotDiff
from bptool.analysis.memory.sweeps import block_of
from bptool.analysis.result import Record, Result
from bptool.instruments.memory.trace import Allocation, MemoryTrace, total_bytes

_LARGEST = 8


class CategoryBytes(Record):
    """Bytes by what they are for; `parameters` has the buffers too."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_state_bytes: int
    activations_bytes: int
    temporaries_bytes: int
    inputs_bytes: int


class PhasePeak(Record):
    """The fullest instant of one phase, and what was being done then; recomputation is not the backward's."""

    phase: str
    peak_allocated_bytes: int
    op: str
    module: str


class ModuleBytes(Record):
    """What one module holds itself, without those inside it.

    Attributes:
        name: dotted; empty for the model itself.
        activations_bytes: what its forward leaves for the backward, when the last forward ends.
    """

    name: str
    parameters_bytes: int
    activations_bytes: int


class TensorGroup(Record):
    """Tensors at the peak that differ in nothing but the number of their block."""

    count: int
    n_bytes: int
    category: str
    module: str
    op: str
    tensor: str


class OpMemory(Record):
    """What one kind of operation made of what is held at the peak."""

    op: str
    n_bytes: int


class Measured(Record):
    """The same step, run in earnest; `relative_error` is (predicted - measured) / measured."""

    peak_allocated_bytes: int
    relative_error: float


class WhatIf(Record):
    """The peak with some settings changed; `settings` are overrides, as they are typed."""

    settings: list[str]
    peak_allocated_bytes: int


class Fitting(Record):
    """Settings that fit.

    Attributes:
        total_expected_bytes: what the device must have in all.
        recompute_over_model_flops: what recomputation adds to the FLOPs of forward and backward, as a share of them.
        same_result: whether the gradient is the same but for rounding; else the arithmetic or the update rule changes.
    """

    settings: list[str]
    peak_allocated_bytes: int
    total_expected_bytes: int
    recompute_over_model_flops: float
    same_result: bool


class MemoryEstimate(Result):
    """The memory of a training step.

    Attributes:
        target, settings: what was asked about, and the overrides on top.
        device: `cpu` or `cuda`; `gpu` is its name, where one was named or found.
        peak_allocated_bytes: most bytes in tensors at once in a steady step, as the allocator counts them.
        peak_reserved_bytes: what the caching allocator holds for them at most; a CPU has none, and it is the same.
        first_step_peak_allocated_bytes: of the first step, which begins without the optimizer's state.
        overhead_bytes: what lies outside of the allocator.
        total_low_bytes, total_expected_bytes, total_high_bytes: what the device must have in all.
        phase_peaks: in the order of the step.
        at_peak: adds up to `peak_allocated_bytes`; `maximum` is each category's own, at its own time.
        loss_bytes: of what is held at the peak, what was made by the loss (logits among them).
        capacity_bytes: what there is; None where nothing is known of the device.
        fits: whether `total_expected_bytes` is within the capacity.
        extrapolated_from_layers: depths that were simulated; empty where the model itself was.
        largest: tensors at the peak, alike ones together, the largest first.
        fitting: settings that fit, the cheapest first, where they were asked for.
        explanation: the closed forms beside what was counted, where they were asked for.
        snapshot_diff: the estimate beside a snapshot of the real thing, where one was given.
        largest_micro_batch_size, longest_sequence_length: that fit, all else as it is, where they were asked for.
    """

    command: ClassVar[str] = "memory-estimate"

    target: str
    settings: list[str]
    device: str
    gpu: str | None
    parameters_count: int
    trainable_parameters_count: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    first_step_peak_allocated_bytes: int
    overhead_bytes: int
    total_low_bytes: int
    total_expected_bytes: int
    total_high_bytes: int
    peak_phase: str
    peak_module: str
    peak_op: str
    phase_peaks: list[PhasePeak]
    at_peak: CategoryBytes
    maximum: CategoryBytes
    loss_bytes: int
    capacity_bytes: int | None
    fits: bool | None
    extrapolated_from_layers: list[int]
    assumptions: list[str]
    measured: Measured | None = None
    modules: list[ModuleBytes]
    ops: list[OpMemory]
    largest: list[TensorGroup]
    what_if: list[WhatIf] = Field(default_factory=list)
    fitting: list[Fitting] = Field(default_factory=list)
    largest_micro_batch_size: int | None = None
    longest_sequence_length: int | None = None
    explanation: Explanation | None = None
    snapshot_diff: SnapshotDiff | None = None


def phase_peaks(trace: MemoryTrace) -> list[PhasePeak]:
    """Of the steady step."""
    peaks = []
    for phase in trace.phases_of(STEADY):
        if phase != "step":  # what is between the others
            event = trace.peak_event(STEADY, phase)
            op, module = trace.events[event].op, trace.events[event].module
            peaks.append(
                PhasePeak(phase=phase, peak_allocated_bytes=int(trace.live_bytes[event]), op=op, module=module)
            )
    return peaks


def categories_at(trace: MemoryTrace, event: int) -> CategoryBytes:
    """What is held after an event."""
    return CategoryBytes(**{f"{name}_bytes": int(live[event]) for name, live in trace.category_bytes.items()})


def category_maxima(trace: MemoryTrace) -> CategoryBytes:
    """The most of each category in the steady step."""
    steady = trace.events_of(STEADY)
    return CategoryBytes(**{f"{name}_bytes": int(live[steady].max()) for name, live in trace.category_bytes.items()})


def module_bytes(trace: MemoryTrace) -> list[ModuleBytes]:
    """Every module that holds parameters or activations itself, in the order of building; blocks one after another."""
    parameters: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    for allocation in trace.live_at(_end_of_forward(trace)):
        if allocation.category in ("parameters", "activations"):
            held = parameters if allocation.category == "parameters" else activations
            for module in modules_of(allocation):
                held[module] += allocation.n_bytes // allocation.count
    return [
        ModuleBytes(name=name, parameters_bytes=parameters[name], activations_bytes=activations[name])
        for name in _block_by_block(dict.fromkeys([*parameters, *activations]))
    ]


def _block_by_block(modules: Iterable[str]) -> list[str]:
    """In the same order, but for those in blocks, which are sorted by their blocks' numbers."""
    names = list(modules)
    blocks = [block_of(name) for name in names]
    inside = iter(sorted((block, i) for i, block in enumerate(blocks) if block is not None))
    return [name if block is None else names[next(inside)[1]] for name, block in zip(names, blocks, strict=True)]


def largest_tensors(trace: MemoryTrace, event: int) -> list[TensorGroup]:
    """At an event, those of like blocks together, the largest sum first."""
    groups: defaultdict[tuple[str, ...], list[Allocation]] = defaultdict(list)
    for a in trace.live_at(event):
        module = ".".join("*" if part.isdigit() else part for part in a.module.split("."))
        groups[a.category, module, a.op, a.tensor].append(a)
    found = [
        TensorGroup(
            count=sum(a.count for a in alike),
            n_bytes=total_bytes(alike),
            category=key[0],
            module=key[1],
            op=key[2],
            tensor=key[3],
        )
        for key, alike in groups.items()
    ]
    return sorted(found, key=lambda group: -group.n_bytes)[:_LARGEST]


def bytes_by_op(trace: MemoryTrace, event: int) -> list[OpMemory]:
    """What activations and temporaries each kind of operation made of what is held, the most first."""
    made: Counter[str] = Counter()
    for allocation in trace.live_at(event):
        if allocation.category in ("activations", "temporaries"):
            made[allocation.op] += allocation.n_bytes
    return [OpMemory(op=op, n_bytes=n_bytes) for op, n_bytes in made.most_common()]


def readings(trace: MemoryTrace) -> dict[str, object]:
    """The fields of a `MemoryEstimate` that the record alone tells."""
    peak = trace.peak_event(STEADY)
    event = trace.events[peak]
    live = trace.live_at(peak)
    return {
        "peak_allocated_bytes": int(trace.live_bytes[peak]),
        "first_step_peak_allocated_bytes": first_step_peak(trace),
        "peak_phase": event.phase,
        "peak_module": event.module,
        "peak_op": event.op,
        "phase_peaks": phase_peaks(trace),
        "at_peak": categories_at(trace, peak),
        "maximum": category_maxima(trace),
        "loss_bytes": total_bytes(a for a in live if _is_of_the_loss(a)),
        "ops": bytes_by_op(trace, peak),
        "largest": largest_tensors(trace, peak),
    }


def _is_of_the_loss(allocation: Allocation) -> bool:
    """Made by the module `loss`, by a head that makes logits, or outside of the model while the loss is taken."""
    return allocation.module in ("loss", "head", "lm_head") and allocation.category in ("activations", "temporaries")


def _end_of_forward(trace: MemoryTrace) -> int:
    """The event that begins the steady step's last backward."""
    steady: list[int] = trace.events_of(STEADY).tolist()
    phases = [trace.events[event].phase for event in steady]
    begins = [event for event, edge in zip(steady[1:], pairwise(phases), strict=True) if edge == ("step", "backward")]
    return begins[-1] if begins else steady[0]
