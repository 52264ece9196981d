"""Will a run fit? Asked before it begins: the kernel kills a process that takes too much, without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from bptool.analysis.activation_budget.planning import settled
from bptool.analysis.memory.alternatives import nearest_fitting
from bptool.analysis.memory.estimate import counted
from bptool.analysis.memory.least import block_inputs_bytes, state_bytes
from bptool.analysis.memory.simulation import STEADY, simulate_deep
from bptool.analysis.question import Question
from bptool.config.overrides import override
from bptool.errors import OutOfMemory
from bptool.units import format_bytes


@dataclass(frozen=True)
class PeakPrediction:
    """Peak of a steady step: its second, which begins with the optimizer's state in place.

    Attributes:
        peak_bytes: of the whole step.
        phase_peaks_bytes: during each phase.
        fits: whether the machine has as much; None where that is not known.
    """

    peak_bytes: int
    phase_peaks_bytes: dict[str, int]
    fits: bool | None = None


def predict_peak(question: Question) -> PeakPrediction:
    """Peak of the second step on the question's machine, simulated."""
    config, workload, _ = settled(question.config, question.workload, question.machine)
    step = counted(simulate_deep(config, workload, question.machine), question.machine)
    trace = step.trace
    phases = {phase: int(trace.live_bytes[trace.peak_event(STEADY, phase)]) for phase in trace.phases_of(STEADY)}
    phases.pop("step")
    return PeakPrediction(step.peak_bytes, phases, step.fits)


def check_fit(question: Question) -> PeakPrediction:
    """The predicted peak, once it is sure that it fits the question's machine.

    Raises:
        OutOfMemory: with the prediction, what is there, and the overrides that would fit.
    """
    check_state_fits(question)
    prediction = predict_peak(question)
    if prediction.fits is False:
        raise out_of_memory(question, prediction)
    return prediction


def check_state_fits(question: Question) -> None:
    """The part of `check_fit` that takes no time.

    Raises:
        OutOfMemory: what every step must hold does not fit.
    """
    available = question.machine.capacity_bytes
    least = state_bytes(question.config, question.workload)
    if available is None:
        return
    if least > available:
        raise OutOfMemory(
            f"weights, gradients and optimizer state alone need {format_bytes(least)};"
            f" {format_bytes(available)} are available",
            _lighter_states(question, available),
        )
    least += block_inputs_bytes(question.config)
    if least > available:
        raise _lack(question, f"at least {format_bytes(least)}")


def out_of_memory(question: Question, prediction: PeakPrediction | None) -> OutOfMemory:
    """The error of a run that does not fit, naming the overrides that would."""
    if prediction is None:
        return _lack(question, "unknown")
    lighter = question
    if prediction.fits is not False:  # the machine has less than it says, and what needs hardly less is no help
        room = min(question.machine.capacity_bytes or prediction.peak_bytes, prediction.peak_bytes * 3 // 4)
        lighter = replace(question, machine=replace(question.machine, capacity_bytes=room))
    return _lack(question, format_bytes(prediction.peak_bytes), lighter)


@contextmanager
def memory_errors(question: Question, prediction: PeakPrediction | None) -> Iterator[None]:
    """Memory that runs out after all, in the words of our errors.

    Raises:
        OutOfMemory: in place of whatever PyTorch raised.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        lack = out_of_memory(question, prediction)
        reason = str(error).strip().splitlines()[0] if str(error) else "no more of it"
        raise OutOfMemory(f"memory ran out ({reason}); {lack.message}", lack.remedy) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch has a type of its own for that in CUDA's allocator alone."""
    words = ("DefaultCPUAllocator", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _lack(question: Question, predicted: str, lighter: Question | None = None) -> OutOfMemory:
    available = question.machine.capacity_bytes
    there = f"{format_bytes(available)} are available" if available is not None else "the device has less"
    return OutOfMemory(f"a step's peak is predicted as {predicted}; {there}", _lighter_step(lighter or question))


def _lighter_step(question: Question) -> str:
    own = question.config.run.workload
    if own:
        return f"make the batches of {own} smaller, or try activation_checkpoint.policy=full"
    found = nearest_fitting(question, wanted=1)
    if not found:
        return "no split of this batch fits; choose fewer sequences a step, or a smaller model"
    lines = [f"{' '.join(one.settings)}   ({format_bytes(one.peak_allocated_bytes)})" for one in found]
    return "\n".join(["these would fit:", *lines])


def _lighter_states(question: Question, available: int) -> str:
    for change in (
        {"optimizer.name": "adafactor"},
        {"precision.mode": "bf16"},
        {"precision.mode": "bf16", "optimizer.name": "adafactor"},
    ):
        least = state_bytes(override(question.config, change), question.workload)
        if least <= available:
            pairs = " ".join(f"{key}={value}" for key, value in change.items())
            return f"{pairs} would need {format_bytes(least)} for them, and activations besides"
    return "no optimizer or precision makes them fit; choose a smaller model, or a machine with more memory"
