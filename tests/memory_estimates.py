"""Memory estimates to show: figures of a real simulated step, and one whose every name is hostile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from small_runs import small_config

from bptool.analysis.memory.result import (
    CategoryBytes,
    Measured,
    MemoryEstimate,
    ModuleBytes,
    PhasePeak,
    WhatIf,
)
from bptool.analysis.memory.simulation import STEADY, simulate
from bptool.analysis.memory.timeline import Timeline, timeline
from bptool.instruments.memory.trace import CATEGORIES, MemoryTrace
from bptool.training.workload import transformer_workload

HOSTILE = """</script></style><img src=x onerror="alert(1)"> & &lt; ' --> ]]>"""


@cache
def small_trace() -> MemoryTrace:
    """Two steps of a transformer of two blocks that recomputes."""
    config = small_config({"activation_checkpoint.policy": "full", "training.gradient_accumulation_steps": 2})
    return simulate(config, transformer_workload(config))


def small_timeline() -> Timeline:
    """Of the second step."""
    return timeline(small_trace(), STEADY)


def small_estimate(changes: Mapping[str, Any] | None = None) -> MemoryEstimate:
    """What `small_trace` amounts to, with `changes` on top."""
    trace = small_trace()
    events, peak = trace.events_of(STEADY), trace.peak_event(STEADY)
    held = trace.category_bytes
    allocated = int(trace.live_bytes[peak])
    phases = [phase for phase in trace.phases_of(STEADY) if phase != "step"]
    figures: dict[str, Any] = {
        "target": "tiny",
        "settings": [],
        "device": "cpu",
        "gpu": None,
        "first_step_peak_allocated_bytes": allocated,
        "total_low_bytes": allocated + 1024,
        "total_expected_bytes": allocated + 4096 + 2048,
        "total_high_bytes": allocated + 4096 + 8192,
        "loss_bytes": 0,
        "ops": [],
        "largest": [],
        "parameters_count": 4096,
        "trainable_parameters_count": 4096,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": allocated + 4096,
        "overhead_bytes": 2048,
        "peak_phase": trace.events[peak].phase,
        "peak_module": trace.events[peak].module,
        "peak_op": trace.events[peak].op,
        "phase_peaks": [_phase_peak(trace, phase) for phase in phases],
        "at_peak": CategoryBytes(**{f"{c}_bytes": int(held[c][peak]) for c in CATEGORIES}),
        "maximum": CategoryBytes(**{f"{c}_bytes": int(held[c][events].max()) for c in CATEGORIES}),
        "capacity_bytes": allocated * 5 // 4,
        "fits": True,
        "extrapolated_from_layers": [],
        "assumptions": ["Kernels as of this machine's torch."],
        "measured": Measured(peak_allocated_bytes=allocated, relative_error=0.0),
        "modules": [
            ModuleBytes(name="", parameters_bytes=0, activations_bytes=512),
            ModuleBytes(name="embedding", parameters_bytes=2048, activations_bytes=0),
            ModuleBytes(name="blocks.0.attention", parameters_bytes=4096, activations_bytes=1024),
            ModuleBytes(name="blocks.1.attention", parameters_bytes=4096, activations_bytes=2048),
        ],
        "what_if": [
            WhatIf(settings=["optimizer.name=adafactor"], peak_allocated_bytes=allocated * 3 // 4),
            WhatIf(settings=["optimizer.name=sgd", "precision.mode=bf16"], peak_allocated_bytes=allocated // 2),
        ],
    }
    return MemoryEstimate(**{**figures, **(changes or {})})


def _phase_peak(trace: MemoryTrace, phase: str) -> PhasePeak:
    i = trace.peak_event(STEADY, phase)
    event = trace.events[i]
    return PhasePeak(phase=phase, peak_allocated_bytes=int(trace.live_bytes[i]), op=event.op, module=event.module)


def hostile_estimate() -> MemoryEstimate:
    """Where a name of the user's can stand, it would break out of a careless page."""
    return small_estimate(
        {
            "device": HOSTILE,
            "gpu": HOSTILE,
            "peak_module": HOSTILE,
            "assumptions": [HOSTILE],
            "modules": [ModuleBytes(name=HOSTILE.replace(".", ""), parameters_bytes=1, activations_bytes=1)],
            "what_if": [WhatIf(settings=[f"run.name={HOSTILE}"], peak_allocated_bytes=1)],
            "phase_peaks": [PhasePeak(phase="forward", peak_allocated_bytes=1, op=HOSTILE, module=HOSTILE)],
        }
    )


def hostile_timeline() -> Timeline:
    """The same of the picture."""
    plain = small_timeline()
    kinds = tuple(replace(kind, module=HOSTILE, op=HOSTILE, tensor=HOSTILE) for kind in plain.kinds)
    return replace(plain, kinds=kinds, points=tuple(replace(p, module=HOSTILE, op=HOSTILE) for p in plain.points))
