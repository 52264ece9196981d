"""A Workload as something to check: the loss of one micro-batch, with the model and the batch in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map  # pytrees have no public name yet

from bptool.analysis.gradcheck.arguments import ModelLoss, in_float64
from bptool.analysis.gradcheck.random_state import random_state_kept
from bptool.analysis.gradcheck.shrink import MOST_PARAMETERS, MOST_SEQUENCES
from bptool.training.assembly import build_model
from bptool.training.gradient_target import GradientTarget
from bptool.training.seeds import derive_seed
from bptool.training.workload import Batch, Workload


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
    exact = tree_map(lambda leaf: in_float64(leaf) if isinstance(leaf, Tensor) else leaf, batch)
    return GradientTarget(ModelLoss(model, workload.loss), (exact,))


def affordable(workload: Workload, target: GradientTarget) -> tuple[Workload, GradientTarget, list[str]]:
    """A large model with a micro-batch of few rows, and a sentence about what was cut; any other as it is.

    A user's model cannot be made smaller, but its micro-batch can where all its tensors have rows: as many.

    Args:
        target: as `workload_target` makes it of the workload.
    """
    loss, (batch,) = target.function, target.inputs
    rows = _rows(batch)
    if not isinstance(loss, ModelLoss) or rows <= MOST_SEQUENCES:
        return workload, target, []
    if sum(parameter.numel() for parameter in loss.model.parameters()) <= MOST_PARAMETERS:
        return workload, target, []
    small = _first_rows(batch)
    try:
        with random_state_kept(), torch.no_grad():
            loss(small)
    except Exception:  # whatever a loss raises that counts on its number of rows
        return workload, target, []
    fewer = replace(workload, batch=lambda generator: _first_rows(workload.batch(generator)))
    return fewer, GradientTarget(loss, (small,)), [f"the micro-batch from {rows} rows to {MOST_SEQUENCES}"]


def _rows(batch: Batch) -> int:
    """The first dimension of all its tensors; 0 where it is not the same."""
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 0


def _first_rows(batch: Batch) -> Batch:
    def first(leaf: Any) -> Any:
        return leaf[:MOST_SEQUENCES] if isinstance(leaf, Tensor) else leaf

    return tree_map(first, batch)
