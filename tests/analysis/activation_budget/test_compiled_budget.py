"""A budget's plan for compiled blocks: it is kept by what they really hold, and changes no gradient."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from compiled_steps import compiled_once
from small_runs import same_bits, small_config

from bptool.analysis.activation_budget.planning import planned
from bptool.analysis.machine import THIS_CPU
from bptool.config.block_plan import saved_operations
from bptool.training.workload import transformer_workload

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # of torch.compile's own insides
]
SHAPE = {
    "model.n_layers": 4,
    "model.d_model": 32,
    "model.d_ff": 96,
    "model.context_length": 64,
    "training.micro_batch_size": 4,
    "training.compile": True,
}
GPT = {"model.norm": "layernorm", "model.position": "learned", "model.activation": "gelu", "model.bias": True}
EXPERTS = {"model.moe.n_experts": 4, "model.moe.d_expert": 16, "model.moe.n_dense_layers": 1}


@pytest.mark.parametrize(
    ("changes", "products"),
    [
        ({"precision.mode": "bf16-mixed"}, {"mm", "attention"}),
        ({**GPT, "model.dropout": 0.1}, {"addmm", "bmm"}),
        (EXPERTS, {"mm", "grouped_linear", "attention"}),
    ],
    ids=["bf16", "gpt", "experts"],
)
def test_what_is_held_is_within_the_plan_and_the_gradient_stays(changes: dict[str, Any], products: set[str]) -> None:
    """Experts' rows depend on values; GPT's attention is written out, as it drops out on a CPU."""
    torch._dynamo.reset()
    everything, plain = compiled_once(small_config({**SHAPE, **changes}))
    budget = {"activation_checkpoint.policy": "budget", "activation_checkpoint.budget": f"{everything // 2}B"}
    config = small_config({**SHAPE, **changes, **budget})
    found = planned(config, transformer_workload(config), THIS_CPU)
    saved = {name for one in found.plan.policies if one.startswith("save:") for name in saved_operations(one)}
    assert {name.rpartition("-")[0] for name in saved} <= products
    held, recomputed = compiled_once(found.config)
    assert everything // 4 < held <= found.plan.n_bytes <= everything // 2
    assert same_bits(plain, recomputed)
