"""Does recomputation change anything? The step's gradients and buffers with and without it, compared to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from bptool.analysis.activation_budget.planning import settled
from bptool.analysis.machine import THIS_CPU
from bptool.config.overrides import of_mode, override
from bptool.config.schema import Config
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.seeds import derive_seed
from bptool.training.workload import Workload

_CPU = torch.device("cpu")


def changed_by_recomputation(config: Config, workload: Workload) -> list[str]:
    """Parameters whose gradient, and buffers whose value, are others than under `activation_checkpoint.policy=none`.

    A step of two micro-batches of the workload's own making is run both ways in float32 on the CPU, from the same
    seeds; the second of them meets what recomputation of the first left behind. What is there is a block that cannot be
    repeated: it draws numbers from elsewhere than PyTorch, counts its calls, or keeps statistics of its inputs (a batch
    norm), which a recomputation takes once more.
    """
    plain = override(config, of_mode("fp32") | {"training.device": "cpu", "training.compile": False})
    without = _left_by(override(plain, {"activation_checkpoint.policy": "none"}), workload)
    chosen, workload, _ = settled(plain, workload, THIS_CPU)
    recomputed = _left_by(chosen, workload)
    return [name for name in without | recomputed if not _same(without.get(name), recomputed.get(name))]


def _left_by(config: Config, workload: Workload) -> dict[str, Tensor]:
    step = build_step(config, workload, _CPU, Announcer())
    generator = torch.Generator().manual_seed(derive_seed(config.run.seed, "batch"))
    batch = workload.batch(generator)
    torch.manual_seed(derive_seed(config.run.seed, "dropout"))
    step.accumulate([batch, batch], [1, 1])
    gradients = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
    return gradients | dict(step.model.named_buffers())


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """To the bit: NaN is NaN, and 0 is not -0."""
    if one is None or other is None:
        return False
    bits = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
