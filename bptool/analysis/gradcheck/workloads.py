"""A Workload as something to check: the loss of one micro-batch, with the model and the batch in float64."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map  # pytrees have no public name yet

from bptool.analysis.gradcheck.arguments import ModelLoss, in_float64
from bptool.training.assembly import build_model
from bptool.training.gradient_target import GradientTarget
from bptool.training.seeds import derive_seed
from bptool.training.workload import Workload


def workload_target(workload: Workload, *, seed: int, device: torch.device | None = None) -> GradientTarget:
    """The loss of one micro-batch; its model is built, and in training mode.

    Args:
        seed: of the weights that the model draws itself, and of the batch.
    """
    device = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "weights"))
        model = build_model(workload, device, torch.float64).train()
        batch = workload.batch(torch.Generator(device).manual_seed(derive_seed(seed, "batch")))
    exact = tree_map(lambda leaf: in_float64(leaf) if isinstance(leaf, torch.Tensor) else leaf, batch)
    return GradientTarget(ModelLoss(model, workload.loss), (exact,))
