"""The same step in earnest: what the allocator says beside what was predicted."""

from __future__ import annotations

import gc

import torch

from bptool.analysis.memory.estimate import Simulated
from bptool.analysis.memory.result import Measured
from bptool.analysis.question import Question
from bptool.errors import OutOfMemory
from bptool.hardware import available_memory_bytes, resolve_device
from bptool.instruments.peak_memory import PeakMemory
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.step import TrainStep
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
    config = step.planned.config if step.planned else question.config
    real = build_step(config, question.workload, device, Announcer())
    peak = PeakMemory(device, real.persistent_tensors)
    real.announcer.instruments.append(peak)
    _run(real, question.config.training.gradient_accumulation_steps, device)
    assert peak.peak_bytes is not None, "the second step was measured"
    return Measured(
        peak_allocated_bytes=peak.peak_bytes, relative_error=(step.peak_bytes - peak.peak_bytes) / peak.peak_bytes
    )


def _run(step: TrainStep, count: int, device: torch.device) -> None:
    generator = torch.Generator(device)
    gc.collect()  # what is released in the measured step must have come in it
    for number in range(2):
        with step.announcer.phase("step"):
            with step.announcer.phase("data"):
                micro_batches = [step.workload.batch(generator) for _ in range(count)]
            step(number, micro_batches)
        del micro_batches
