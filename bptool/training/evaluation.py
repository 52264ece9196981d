"""The held-out loss, through the same loss function as training, so that what trains also evaluates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bptool.training.precision import Precision
from bptool.training.workload import Batch, Workload


@torch.no_grad()
def evaluate(model: nn.Module, workload: Workload, precision: Precision, batches: Iterable[Batch]) -> float:
    """Mean loss over everything that the batches count (nats per token), without dropout."""
    was_training = model.training
    model.eval()
    try:
        total, weight = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            with precision.autocast():
                loss = workload.loss(model, batch)
            counted = int(workload.weight(batch))
            total += loss.double().cpu() * counted
            weight += counted
    finally:
        model.train(was_training)
    return float(total / max(weight, 1))
