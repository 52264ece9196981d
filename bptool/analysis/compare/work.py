"""A job's work, in its own process: whatever goes wrong in it is an outcome."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bptool.analysis.activation_budget.planning import BudgetTooSmall, with_plan
from bptool.analysis.compare.gradient_error import gradient_error, write_reference
from bptool.analysis.compare.job import Job, Outcome
from bptool.analysis.compare.timed_run import timed_run
from bptool.analysis.gradient_equality import changed_by_recomputation
from bptool.analysis.memory.fit import is_out_of_memory
from bptool.analysis.question import Question, ask
from bptool.config.block_plan import parse_plan, write_plan
from bptool.config.overrides import override
from bptool.errors import BptoolError, ConfigError, DeviceError, OutOfMemory
from bptool.hardware import tune_cpu_allocator
from bptool.training.activation_checkpoint import PolicyUnfit
from bptool.training.user_code import describe
from bptool.training.workload import transformer_workload

_CANNOT = (DeviceError, ConfigError, BudgetTooSmall, PolicyUnfit)
"""The device, the model, or another setting is against it."""


def done(job: Job) -> Outcome:
    """Ask the job's question again, and do what the job says."""
    # What fake tensors refuse is told in a line; PyTorch would also log a traceback.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        question = ask(job.target, job.settings, command="compare", device=job.device)
        if question.machine.device == "cpu":
            tune_cpu_allocator()
        return _KINDS[job.kind](question, job)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return _failed(error)


def _run(question: Question, job: Job) -> Outcome:
    return timed_run(question, Path(job.folder), warmup=job.warmup, steps=job.steps)


def _equality(question: Question, job: Job) -> Outcome:
    if question.machine.device == "cuda" and question.code is None:
        question = _shrunk(question)
    return Outcome(figures={"changed": changed_by_recomputation(question.config, question.workload)})


def _shrunk(question: Question) -> Question:
    """What a CPU can do of a GPU's model: a few blocks, each of which is treated in one of the ways that it has."""
    config = with_plan(question).config
    settings, model = config.activation_checkpoint, config.model
    changes: dict[str, object] = {
        "training.micro_batch_size": 1,
        "training.sequence_length": min(config.training.sequence_length, 128),
    }
    if settings.policy == "plan":
        kinds = sorted(set(parse_plan(settings.plan)))
        changes |= {"activation_checkpoint.plan": write_plan(kinds), "model.n_layers": len(kinds)}
    else:
        changes["model.n_layers"] = min(model.n_layers, question.workload.head + question.workload.period + 1)
    small = override(config, changes)
    return replace(question, config=small, workload=transformer_workload(small))


def _reference(question: Question, job: Job) -> Outcome:
    return write_reference(question, Path(job.folder), Path(job.reference), sequences=job.sequences)


def _gradient(question: Question, job: Job) -> Outcome:
    return gradient_error(question, Path(job.folder), Path(job.reference), sequences=job.sequences)


_KINDS: dict[str, Callable[[Question, Job], Outcome]] = {
    "run": _run,
    "equality": _equality,
    "reference": _reference,
    "gradient": _gradient,
}


def _failed(error: BaseException) -> Outcome:
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        reason = error.message if isinstance(error, BptoolError) else _first_line(str(error) or "no more memory")
        return Outcome(status="out_of_memory", reason=f"memory ran out: {reason}")
    if isinstance(error, BptoolError):
        return Outcome(status="unsupported" if isinstance(error, _CANNOT) else "failed", reason=error.message)
    if "not implemented for" in str(error):  # PyTorch's words for a kernel that this device and dtype have not
        return Outcome(status="unsupported", reason=_first_line(str(error)))
    return Outcome(status="failed", reason=describe(error))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]
