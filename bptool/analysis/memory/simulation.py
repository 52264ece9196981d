"""A training step on fake tensors, under the memory ledger: the trainer's own step, and nothing allocated."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils._pytree import tree_leaves  # what torch itself nests tensors with

from bptool.analysis.like_blocks import shallow_models
from bptool.analysis.machine import THIS_CPU, Machine
from bptool.analysis.memory.depth import Extended, extended
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.instruments.memory.peak import unique_storage_bytes
from bptool.instruments.memory.trace import MemoryTrace
from bptool.instruments.packed_sequences import taken_for_unpacked
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.step import TrainStep
from bptool.training.workload import Workload, one

FIRST, STEADY = 0, 1
"""Numbers of the steps in the record: what the first one's optimizer makes, and the second step, all of it."""


def simulate(config: Config, workload: Workload, machine: Machine = THIS_CPU) -> MemoryTrace:
    """The record of the trainer's own step on fake tensors. Nothing is allocated and nothing is compiled.

    Of the first step only the optimizer runs, on gradients of zero, which makes its state; the second runs whole.
    From the second micro-batch of a step on each does what the second does, so no more than two are run; those that
    wait for their turn are counted.
    """
    countable = replace(workload, weight=one)  # how much a batch counts would be read from its values
    count = config.training.gradient_accumulation_steps
    with machine.simulated() as ledger:
        step = build_step(eager_on_cpu(config), countable, torch.device("cpu"), Announcer([ledger]))
        with ledger.watching(step.model, step.optimizers), taken_for_unpacked():
            _make_optimizer_state(step)
            _run_step(step, count)
        return ledger.trace()


def simulate_deep(config: Config, workload: Workload, machine: Machine = THIS_CPU) -> Extended:
    """The same from shallow models, where the workload knows how to make them and they are alike."""
    models = shallow_models(config, workload)
    if models is None:
        return Extended(simulate(config, workload, machine), ())
    return extended(models.blocks, lambda lengths: simulate(*models.of(lengths), machine))


def first_step_peak(trace: MemoryTrace) -> int:
    """Most bytes of a first step: until its optimizer runs, a later step's without the optimizer's state."""
    at_optimizer = int(trace.events_of(STEADY, "optimizer")[0])
    held = {name: int(live[at_optimizer]) for name, live in trace.category_bytes.items()}
    before = trace.events_of(STEADY)
    before = before[before < at_optimizer]
    others = held["inputs"] + held["activations"] + held["temporaries"]
    optimizer = int(trace.live_bytes[trace.peak_event(FIRST, "optimizer")]) + others
    return max(int(trace.live_bytes[before].max()) - held["optimizer_state"], optimizer)


def _make_optimizer_state(step: TrainStep) -> None:
    with step.announcer.phase("step"):
        with step.announcer.phase("backward"):
            for parameter in step.optimizers.parameters:
                parameter.grad = torch.zeros_like(parameter)
        with step.announcer.phase("optimizer"):
            step.optimizers.step()
        step.optimizers.zero_grad()


def _run_step(step: TrainStep, count: int) -> None:
    """One step on micro-batches of the workload's own making; the third and later ones are there, but not run."""
    generator = torch.Generator()
    with step.announcer.phase("step"):
        with step.announcer.phase("data"):
            micro_batches = [step.workload.batch(generator) for _ in range(min(count, 2))]
            tensors = [leaf for leaf in tree_leaves(micro_batches[0]) if isinstance(leaf, torch.Tensor)]
            waiting = torch.empty((max(count - 2, 0), unique_storage_bytes(tensors)), dtype=torch.uint8)
        step(STEADY, micro_batches)
        del waiting


WITHOUT_COMPILER = "memory is predicted without torch.compile, whose fusion saves some of the activations"
"""What is to be said of a prediction for blocks that are compiled."""


def eager_on_cpu(config: Config) -> Config:
    """The same step without what needs a compiler or a GPU. No tensor's size changes; fewer live where blocks are
    compiled (`WITHOUT_COMPILER`)."""
    mode = config.precision.mode.replace("tf32", "fp32")
    return override(config, {"training.compile": False, "precision.mode": mode})
