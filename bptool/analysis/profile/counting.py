"""What a training step does, counted on fake tensors: the trainer's own step, and nothing computed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch

from bptool.analysis.like_blocks import shallow_models
from bptool.analysis.machine import THIS_CPU, Machine
from bptool.analysis.memory.simulation import eager_on_cpu
from bptool.analysis.profile.depth import Counted, extended
from bptool.analysis.profile.tally import Tally, tally_of
from bptool.analysis.question import Question
from bptool.config.schema import Config
from bptool.instruments.operations.recorder import OperationRecorder
from bptool.instruments.packed_sequences import taken_for_unpacked
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.step import TrainStep
from bptool.training.workload import Workload, one


def count_question(question: Question) -> Counted:
    """The step that is asked about."""
    return count_deep(question.config, question.workload, question.machine)


def count_deep(config: Config, workload: Workload, machine: Machine = THIS_CPU) -> Counted:
    """From shallow models, where the workload knows how to make them and their blocks are alike."""
    models = shallow_models(config, workload)
    if models is None:
        return Counted(count(config, workload, machine), ())
    return extended(models.blocks, lambda lengths: count(*models.of(lengths), machine))


def count(config: Config, workload: Workload, machine: Machine = THIS_CPU) -> Tally:
    """A later step's (the optimizer has its state); of its micro-batches two are run at most, and the rest are alike.

    On a machine whose tensors are not fake the step is run in earnest.
    """
    countable = replace(workload, weight=one)  # how much a batch counts would be read from its values
    micro_batches = config.training.gradient_accumulation_steps
    recorder = OperationRecorder()
    with machine.pretended(), recorder, taken_for_unpacked():
        step = build_step(eager_on_cpu(config), countable, torch.device("cpu"), Announcer([recorder]))
        _make_optimizer_state(step)
        with recorder.watching(step.model), recorder.counting_once() if machine.fake else nullcontext():
            _run_step(step, min(micro_batches, 2))
        return tally_of(recorder.traces()[-1], step.model, micro_batches, min(micro_batches, 2))


def _make_optimizer_state(step: TrainStep) -> None:
    """An update by nothing, before the step."""
    for parameter in step.optimizers.parameters:
        parameter.grad = torch.zeros_like(parameter)
    with step.announcer.phase("optimizer"):
        step.optimizers.step()
    step.optimizers.zero_grad()


def _run_step(step: TrainStep, micro_batches: int) -> None:
    generator = torch.Generator()
    with step.announcer.phase("step"):
        with step.announcer.phase("data"):
            batches = [step.workload.batch(generator) for _ in range(micro_batches)]
        step(1, batches)
