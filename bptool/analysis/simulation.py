"""A training step on fake tensors, under the memory ledger: the trainer's own step, and nothing allocated."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # documented for shape propagation; no public path yet
from torch.utils._pytree import tree_leaves  # what torch itself nests tensors with

from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.instruments.memory_ledger import MemoryLedger
from bptool.instruments.memory_trace import MemoryTrace
from bptool.instruments.peak_memory import unique_storage_bytes
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.step import TrainStep
from bptool.training.workload import Workload, one

FIRST, STEADY = 0, 1
"""Numbers of the steps in the record: the first makes the optimizer's state, the second begins with it."""


def simulate(config: Config, workload: Workload) -> MemoryTrace:
    """Run two steps of the trainer's own step on fake CPU tensors, and return the record.

    Nothing is allocated and nothing is compiled. From the second micro-batch of a step on each does what the second
    does, so no more than two are run; those that wait for their turn are counted.
    """
    countable = replace(workload, weight=one)  # how much a batch counts would be read from its values
    count = config.training.gradient_accumulation_steps
    with FakeTensorMode(), MemoryLedger() as ledger:
        step = build_step(eager_on_cpu(config), countable, torch.device("cpu"), Announcer([ledger]))
        with ledger.watching(step.model, step.optimizers):
            for number in (FIRST, STEADY):
                _run_step(step, number, count)
        return ledger.trace()


def _run_step(step: TrainStep, number: int, count: int) -> None:
    """One step on micro-batches of the workload's own making; the third and later ones are there, but not run."""
    generator = torch.Generator()
    with step.announcer.phase("step"):
        with step.announcer.phase("data"):
            micro_batches = [step.workload.batch(generator) for _ in range(min(count, 2))]
            tensors = [leaf for leaf in tree_leaves(micro_batches[0]) if isinstance(leaf, torch.Tensor)]
            waiting = torch.empty((max(count - 2, 0), unique_storage_bytes(tensors)), dtype=torch.uint8)
        step(number, micro_batches)
        del waiting


def eager_on_cpu(config: Config) -> Config:
    """The same step without what needs a compiler or a GPU and changes no tensor's size."""
    mode = config.precision.mode.replace("tf32", "fp32")
    return override(config, {"training.compile": False, "precision.mode": mode})
