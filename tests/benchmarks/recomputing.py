"""Forward and backward of a model that recomputes in some way, in a process of its own: `recomputing.py KEY=VALUE ...`.

`partitioner=0.5:inductor` among the arguments: blocks are compiled for that backend, and PyTorch's own
`activation_memory_budget` says how much of what they save they may. It prints what the forward holds, by the
allocator's events; then, for each line that it reads, the processor's seconds of one more forward and backward.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings

import torch
import torch._functorch.config as functorch
from step_seconds import config_of

from bptool.config.schema import Config
from bptool.hardware import tune_cpu_allocator
from bptool.instruments.memory.peak import noted_allocations
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.step import TrainStep
from bptool.training.workload import transformer_workload

PARTITIONER = "partitioner="
CPU = torch.device("cpu")


def config_with(settings: list[str]) -> Config:
    """Four blocks of 384 wide, with these settings."""
    return config_of("small", 10, ["model.n_layers=4", "training.micro_batch_size=4", *settings])


def step_with(settings: list[str]) -> TrainStep:
    """Ready to run, and compiled where it is to be."""
    ours = [one for one in settings if not one.startswith(PARTITIONER)]
    config = config_with(ours)
    step = build_step(config, transformer_workload(config), CPU, Announcer())
    step.model.train()
    for share, _, backend in (one.removeprefix(PARTITIONER).partition(":") for one in settings if one not in ours):
        functorch.activation_memory_budget = float(share)
        for block in step.workload.blocks(step.model):
            block.forward = torch.compile(block.forward, backend=backend)
    return step


def run(step: TrainStep) -> float:
    """Processor's seconds of a forward and a backward of the same batch."""
    batch = step.workload.batch(torch.Generator().manual_seed(1))
    start = time.process_time()
    loss = step.workload.loss(step.model, batch)
    loss.backward()
    seconds = time.process_time() - start
    step.optimizers.zero_grad()
    return seconds


def held_bytes(step: TrainStep) -> int:
    """What a forward leaves for its backward."""
    gc.collect()  # what is released in it must have come in it
    batch = step.workload.batch(torch.Generator().manual_seed(1))
    with noted_allocations() as changes:
        loss = step.workload.loss(step.model, batch)
    held = sum(changes)
    loss.backward()
    step.optimizers.zero_grad()
    return held


def main() -> None:
    warnings.filterwarnings("ignore")  # of torch.compile's own insides
    tune_cpu_allocator()
    step = step_with(sys.argv[1:])
    run(step)  # the first time compiles
    print(json.dumps({"held_bytes": held_bytes(step)}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": run(step)}), flush=True)


if __name__ == "__main__":
    main()
