"""From a command line's words to the answers about a step's memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bptool.analysis import question as questions
from bptool.analysis.closed_forms.explanation import Explanation, explain
from bptool.analysis.machine import Machine
from bptool.analysis.memory.alternatives import nearest_fitting, what_if
from bptool.analysis.memory.estimate import Simulated, estimate, simulated
from bptool.analysis.memory.limits import largest_micro_batch, longest_sequence
from bptool.analysis.memory.result import MemoryEstimate
from bptool.analysis.memory.snapshot_diff import diff
from bptool.analysis.memory.validation import measured
from bptool.analysis.question import Question
from bptool.errors import DataError, DeviceError, TargetError, UsageError
from bptool.interop.memory_snapshot import Snapshot, read_snapshot
from bptool.training.user_code import users_errors
from bptool.units import parse_bytes

_QUANTITY = "such as 24GiB (2^30 bytes each) or 24GB (10^9)"


@dataclass(frozen=True)
class Further:
    """What else is asked.

    Attributes:
        what_if: what each switch would save.
        limits: the settings, the largest micro-batch and the longest sequence that fit.
        explain: the closed forms, beside what was counted.
        validate: a real step.
        snapshot: a snapshot of PyTorch's allocator to compare with.
    """

    what_if: bool = False
    limits: bool = False
    explain: bool = False
    validate: bool = False
    snapshot: Path | None = None


def ask(
    target_text: str | None, overrides: Sequence[str], *, device: str, gpu: str | None, capacity: str | None
) -> Question:
    """The question that a command line asks.

    Args:
        device, gpu: as `machine_named` takes them; `training.device` says where `device` is `auto`.
        capacity: what it must fit, such as `24GiB`; None: what the machine has.

    Raises:
        UsageError: the command line or the config is wrong, or the user's model cannot be had.
    """
    question = questions.ask(target_text, overrides, command="memory-estimate", device=device, gpu=gpu)
    return replace(question, machine=_within(question.machine, capacity))


def answer(question: Question, further: Further) -> tuple[MemoryEstimate, Simulated]:
    """The estimate with everything that is asked, and the record that it was read from.

    Raises:
        BptoolError: the user's model fails, the snapshot cannot be read, or a real step is not possible here.
    """
    if further.validate and question.machine.gpu and not torch.cuda.is_available():
        raise DeviceError(
            "--validate runs a real step, and this machine has no GPU",
            "leave out --validate, or predict and measure for this CPU: --device cpu",
        )
    theirs = _snapshot(further.snapshot, question.machine) if further.snapshot else None
    with users_errors(question.code):
        question, step = _simulated(question, further)
        more: dict[str, object] = {}
        if further.validate:
            more["measured"] = measured(question, step)
        if theirs:
            more["snapshot_diff"] = diff(*step.written_out(), theirs)
        if further.explain:
            more["explanation"] = _explained(question, step)
        if further.what_if:
            more["what_if"] = what_if(question)
        if further.limits or step.fits is False:
            more["fitting"] = nearest_fitting(question)
        if further.limits:
            more["largest_micro_batch_size"] = largest_micro_batch(question)
            more["longest_sequence_length"] = longest_sequence(question)
        return estimate(question, step).model_copy(update=more), step


def _simulated(question: Question, further: Further) -> tuple[Question, Simulated]:
    """On fake tensors; a user's model that reads values runs in earnest where a real step is asked for anyway."""
    # Told in our own words; PyTorch would also log a traceback.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        return question, simulated(question.config, question.workload, question.machine)
    except TargetError:
        if not further.validate or question.machine.gpu:
            raise
        sentence = "this model does not run on fake tensors: counted in a real step"
        real = replace(question.machine, fake=False, assumptions=(*question.machine.assumptions, sentence))
        question = replace(question, machine=real)
        return question, simulated(question.config, question.workload, real)


def _snapshot(path: Path, machine: Machine) -> Snapshot:
    if machine.gpu is None:
        raise UsageError(
            f"--snapshot-diff {path}: a snapshot is of a GPU's memory, and this estimate is of a CPU's",
            "name the GPU that it was recorded on: --gpu NAME",
        )
    snapshot = read_snapshot(path)
    if not snapshot.segments and not snapshot.history:
        raise DataError(f"--snapshot-diff {path}: nothing was on a GPU when it was recorded", "record it after a step")
    return snapshot


def _explained(question: Question, step: Simulated) -> Explanation:
    if question.machine.gpu is None:
        return explain(question.config, step.written_out()[0])
    return explain(question.config, step.written_out()[0].rounded(512), device="cuda")


def _within(machine: Machine, capacity: str | None) -> Machine:
    if capacity is None:
        return machine
    try:
        n_bytes = parse_bytes(capacity)
    except ValueError as error:
        raise UsageError(f"--fit: {error}", _QUANTITY) from None
    if n_bytes == 0:
        raise UsageError(f"--fit: nothing fits into '{capacity}'", _QUANTITY)
    return replace(machine, capacity_bytes=n_bytes)
