"""Is the step run, or only counted? And what it would hold in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bptool.analysis.memory.fit import PeakPrediction, predict_peak
from bptool.analysis.memory.least import least_bytes
from bptool.analysis.profile.result import PhaseMemory
from bptool.analysis.question import Question
from bptool.errors import BptoolError
from bptool.gpus import gpu_reporting
from bptool.training.user_code import describe
from bptool.units import format_bytes


@dataclass(frozen=True)
class Admission:
    """Whether the step is run.

    Attributes:
        refusal: why it is only counted; empty: it is run.
        expected: whether the user said so, or asked for a GPU that is elsewhere.
        prediction: of its memory; None where that is not known.
        note: why it is not.
    """

    refusal: str = ""
    expected: bool = False
    prediction: PeakPrediction | None = None
    note: str = ""

    @property
    def memory(self) -> list[PhaseMemory]:
        """Peak of each phase, in the step's order."""
        peaks = self.prediction.phase_peaks_bytes if self.prediction else {}
        return [PhaseMemory(phase=phase, peak_allocated_bytes=peak) for phase, peak in peaks.items()]


def admission(question: Question, *, measure: bool) -> Admission:
    """Of the question's step; a step that cannot fit is not simulated to find out by how much.

    Args:
        measure: whether it is to be run where it can be.
    """
    refusal, expected = ("not run, as was asked", True) if not measure else (_elsewhere(question), True)
    capacity = question.machine.capacity_bytes
    least = least_bytes(question.config, question.workload)
    if capacity is not None and least > capacity:
        lack = f"not run: it needs {format_bytes(least)} at least, and {format_bytes(capacity)} are there"
        return Admission(refusal or lack, bool(refusal), None, f"memory is not simulated: {lack.partition(': ')[2]}")
    try:
        prediction = predict_peak(question)
    except BptoolError:
        raise
    except Exception as error:  # a user's model may do what fake tensors cannot; the step itself may still work
        return Admission(refusal, expected, None, f"memory is not predicted: {describe(error)}")
    if not refusal and prediction.fits is False:
        peak = format_bytes(prediction.peak_bytes)
        refusal, expected = f"not run: its peak is predicted as {peak}; {format_bytes(capacity or 0)} are there", False
    return Admission(refusal, expected, prediction)


def _elsewhere(question: Question) -> str:
    """Why the machine asked about is not this one; empty where it is."""
    asked = question.machine.gpu
    if asked is None:
        return ""
    if not torch.cuda.is_available():
        return f"not run: {asked.name} is not here, this machine has no GPU"
    name = torch.cuda.get_device_name()
    here = gpu_reporting(name)
    return "" if here is None or here.words == asked.words else f"not run: this machine's GPU is {name}"
