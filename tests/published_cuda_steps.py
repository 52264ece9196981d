"""Whole training steps that others measured on a GPU, as workloads of a user's: the product predicts them.

Forward, backward and update under autocast, allocated and reserved; what differs from the command's own steps (weights
that are moved to the GPU, outputs that are held through the backward) is written out here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from resnet import ResNet50
from small_runs import small_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, GPT2Config, GPT2LMHeadModel

from bptool.analysis.machine import machine_named
from bptool.analysis.memory.estimate import Simulated, simulated
from bptool.training.workload import Batch, Workload

STEPS: dict[str, Any] = json.loads(Path(__file__).with_name("published_cuda_steps.json").read_text())

_SETTINGS = {
    "precision.mode": "bf16-mixed",
    "optimizer.name": "adamw",
    "optimizer.implementation": "foreach",
    "training.clip_norm": 0.0,
}


def predicted_step(model: str, batch: int, size: int) -> Simulated:
    """One of the published rows, as `memory-estimate` simulates it."""
    return simulated(small_config(_SETTINGS), _WORKLOADS[model](batch, size), machine_named("auto", STEPS["gpu"]))


def _gpt2(batch: int, tokens: int) -> Workload:
    def loss(model: nn.Module, ids: Batch) -> Tensor:
        out = model(input_ids=ids, labels=ids)
        # Their script has the output in a variable: logits, keys and values live until the step ends.
        return _holding(out.loss, (out.logits, out.past_key_values))

    return Workload(_moved(lambda: GPT2LMHeadModel(GPT2Config())), _ids(batch, tokens), loss)


def _encoder(make: Callable[[], nn.Module]) -> Callable[[int, int], Workload]:
    def loss(model: nn.Module, ids: Batch) -> Tensor:
        out = model(input_ids=ids)
        return _holding(out.last_hidden_state.float().pow(2).mean(), out)

    return lambda batch, tokens: Workload(_moved(make), _ids(batch, tokens), loss)


def _resnet50(batch: int, pixels: int) -> Workload:
    def pictures(generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(batch, 3, pixels, pixels, generator=generator)
        return {"x": x, "y": torch.randint(0, 1000, (batch,), generator=generator)}

    return Workload(ResNet50, pictures, lambda model, batch: cross_entropy(model(batch["x"]), batch["y"]))


def _holding(loss: Tensor, held: object) -> Tensor:
    loss.held = held  # type: ignore[attr-defined]
    return loss


def _ids(batch: int, tokens: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(0, 30000, (batch, tokens), generator=generator)


def _moved(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A model that is made elsewhere and moved here, weight by weight: a tied one has no copy of its own first."""

    def moved() -> nn.Module:
        here = torch.get_default_device()
        with torch.device("meta"):
            model = make()
        copies: dict[Tensor, Any] = {}
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
                module.register_parameter(name, copies.setdefault(weight, _empty(weight, here)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=here))
        return model

    def _empty(weight: nn.Parameter, device: torch.device) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(weight, device=device))

    return moved


_WORKLOADS: dict[str, Callable[[int, int], Workload]] = {
    "gpt2": _gpt2,
    "distilbert": _encoder(lambda: DistilBertModel(DistilBertConfig())),
    "bert": _encoder(lambda: BertModel(BertConfig())),
    "resnet50": _resnet50,
}
