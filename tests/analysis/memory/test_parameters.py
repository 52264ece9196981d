"""A deep model's parameters, summed from two shallow ones, against the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_runs import small_config
from torch import Tensor

from bptool.analysis.memory.parameters import sum_of_parameters
from bptool.config.loading import load_config
from bptool.config.target import resolve_target
from bptool.model.accounting import count_parameters
from bptool.training.assembly import build_model
from bptool.training.workload import transformer_workload

EXPERTS = {"model.moe.n_experts": 4, "model.moe.n_active": 2, "model.moe.d_expert": 16}
META = torch.device("meta")


@pytest.mark.parametrize("preset", ["gpt2-xl", "llama3.2-1b", "llama3-405b"])
def test_of_a_preset(preset: str) -> None:
    config = load_config(resolve_target(preset), [])
    found = sum_of_parameters(transformer_workload(config), Tensor.numel, torch.float32)
    assert found == count_parameters(config.model).total


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 9, 10])
@pytest.mark.parametrize(
    "changes",
    [{}, EXPERTS, {**EXPERTS, "model.moe.n_dense_layers": 3}, {"model.sliding_window": 4, "model.norm": "layernorm"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_any_depth(n_layers: int, changes: dict[str, Any], dtype: torch.dtype) -> None:
    changes = {**changes, "model.n_layers": max(n_layers, int(changes.get("model.moe.n_dense_layers", 0)))}
    workload = transformer_workload(small_config(changes))
    found = sum_of_parameters(workload, lambda p: p.nbytes, dtype)
    assert found == sum(p.nbytes for p in build_model(workload, META, dtype).parameters())
