"""The same step in earnest: what the allocator says beside what was predicted."""

from __future__ import annotations

import gc
from dataclasses import replace

from bptool.analysis.memory.estimate import Simulated
from bptool.analysis.memory.result import Measured
from bptool.analysis.question import Question
from bptool.analysis.real_step import RealStep
from bptool.errors import OutOfMemory
from bptool.hardware import available_memory_bytes, resolve_device
from bptool.instruments.memory.peak import PeakMemory
from bptool.units import format_bytes


def measured(question: Question, step: Simulated) -> Measured:
    """Run two real steps on random batches, and measure the second.

    Raises:
        OutOfMemory: there is not enough of it here.
    """
    device = resolve_device(question.machine.device)
    available, needed = available_memory_bytes(device), step.peak_bytes
    if needed > available:
        raise OutOfMemory(
            f"--validate runs a real step of {format_bytes(needed)}; {format_bytes(available)} are available",
            "make the batch or the model smaller",
        )
    real = RealStep(replace(question, config=step.planned.config) if step.planned else question)
    peak = PeakMemory(device, real.step.persistent_tensors)
    real.step.announcer.instruments.append(peak)
    gc.collect()  # what is released in the measured step must have come in it
    for _ in range(2):
        real.run()
    assert peak.peak_bytes is not None, "the second step was measured"
    return Measured(
        peak_allocated_bytes=peak.peak_bytes, relative_error=(step.peak_bytes - peak.peak_bytes) / peak.peak_bytes
    )
