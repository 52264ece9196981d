"""What is trained: a model, its micro-batches and its loss. The built-in transformer is one workload among others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # no public name tells a fake tensor from a real one

from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.data.batches import Batch as TokenBatch
from bptool.interop.huggingface import load_weights
from bptool.model.transformer import Transformer, build
from bptool.training.seeds import derive_seed

Batch = Any
"""One micro-batch: any nest of tensors that `Workload.loss` understands."""


def longest_module_list(model: nn.Module) -> Sequence[nn.Module]:
    """The model's repeated blocks: its longest `ModuleList` or `Sequential`, or nothing where there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    return list(max(lists, key=len, default=[]))


def one(batch: Batch) -> int:
    """Every micro-batch counts the same."""
    return 1


@dataclass(frozen=True)
class Workload:
    """A model, its micro-batches and its loss: all that a command needs to know.

    Attributes:
        model: builds the model on the current default device (real, `meta` or fake) and in the default dtype.
        batch: makes one micro-batch, any nest of tensors, from a generator.
        loss: a scalar, the mean over what `weight` counts.
        weight: how much of the step's mean loss a micro-batch is, such as its number of valid tokens, so that k
            micro-batches give the same gradient as one batch.
        blocks: the repeated blocks, for activation checkpointing, compilation and Muon.
        unit: what `weight` counts, as screens name it.
        n_layers, of_depth: how many like blocks `model.blocks` has, and the same workload with another number of them,
            so that a deep model's memory is known from shallow ones; None: it is always run as it is.
        head, period: blocks at the beginning that are not like the later ones, and after how many the pattern repeats.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    weight: Callable[[Batch], int] = one
    blocks: Callable[[nn.Module], Sequence[nn.Module]] = longest_module_list
    unit: str = "micro-batches"
    n_layers: int = 0
    of_depth: Callable[[int], Workload] | None = None
    head: int = 1
    period: int = 1


def transformer_workload(config: Config) -> Workload:
    """The built-in transformer with the config's shapes, on random tokens where no corpus is asked for."""
    settings, training = config.model, config.training

    def model() -> Transformer:
        transformer = build(
            settings,
            device=torch.empty(0).device,  # the default one; `get_default_device` makes a tensor of values to find out
            seed=derive_seed(config.run.seed, "weights"),
            dtype=torch.get_default_dtype(),
        )
        weight = transformer.embedding.weight
        if settings.weights and not (weight.is_meta or isinstance(weight, FakeTensor)):
            transformer.load_state_dict(load_weights(Path(settings.weights), settings))
        return transformer

    def batch(generator: torch.Generator) -> TokenBatch:
        shape = (training.micro_batch_size, training.sequence_length + 1)
        ids = torch.randint(settings.vocab_size, shape, generator=generator, device=generator.device)
        return {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}

    def loss(model: nn.Module, batch: TokenBatch) -> Tensor:
        result: Tensor = model(batch["tokens"], batch["targets"], loss=training.loss)
        return result

    def of_depth(n_layers: int) -> Workload:
        # A plan would be for another number of blocks; it is none of the workload's.
        changes = {"model.n_layers": n_layers, "activation_checkpoint.policy": "none"}
        return transformer_workload(override(config, changes))

    return Workload(
        model=model,
        batch=batch,
        loss=loss,
        weight=lambda batch: batch["targets"].numel(),
        blocks=lambda model: list(model.blocks),  # type: ignore[arg-type]
        unit="tokens",
        n_layers=settings.n_layers,
        of_depth=of_depth,
        head=2 + settings.moe.n_dense_layers if settings.moe.n_experts else 1,  # a sum of imbalances needs two
        period=max(settings.sliding_window_pattern, 1) if settings.sliding_window else 1,
    )
