"""A step whose blocks are compiled: what its forward holds, and its gradients."""

from __future__ import annotations

import gc

import torch
from small_runs import random_batches, transformer_step
from torch import Tensor

from bptool.config.schema import Config
from bptool.instruments.memory.peak import noted_allocations
from bptool.training.step import TrainStep


def once(step: TrainStep) -> tuple[int, dict[str, Tensor]]:
    """Bytes that a forward holds for its backward, by the allocator's own events, and the gradients."""
    [batch] = random_batches(step, 1)
    step.optimizers.zero_grad()
    gc.collect()  # what is released in it must have come in it
    torch.manual_seed(5)
    with noted_allocations() as events, step.precision.autocast():
        loss = step.workload.loss(step.model, batch)
    held = sum(events)
    loss.backward()
    return held, {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


def compiled_once(config: Config) -> tuple[int, dict[str, Tensor]]:
    """And then once more: the first time compiles, which allocates too."""
    step = transformer_step(config)
    once(step)
    return once(step)
