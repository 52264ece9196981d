"""Every activation-checkpointing policy's peak, predicted on fake tensors, is the CPU allocator's own to the byte."""

from __future__ import annotations

from typing import Any

import pytest
from allocator_events import first_departure, measured_peak
from foreign_models import gpt2
from small_runs import small_config

from bptool.analysis.memory.simulation import STEADY, simulate, simulate_deep
from bptool.config.block_plan import BLOCK_POLICIES
from bptool.config.schema import Config
from bptool.training.workload import Workload, transformer_workload

# Wide and long enough that most of what is held is the blocks', so that a policy shows in the peak.
SHAPE: dict[str, Any] = {
    "model.n_layers": 4,
    "model.d_model": 32,
    "model.d_ff": 96,
    "model.context_length": 96,
    "training.micro_batch_size": 4,
    "optimizer.name": "sgd",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model.n_kv_heads": 1, "model.qk_norm": True},
    "gpt": {"model.norm": "layernorm", "model.position": "learned", "model.activation": "gelu", "model.bias": True},
    "written out": {"model.attention": "eager"},
    "latent": {"model.mla.kv_rank": 8, "model.mla.q_rank": 8},
    "experts": {"model.moe.n_experts": 4, "model.moe.d_expert": 16, "model.moe.n_shared": 1},
    "autocast": {"precision.mode": "bf16-mixed"},
    "bf16": {"precision.mode": "bf16"},
}
FAST = [("llama", 0.1), ("gpt", 0.0)]
each_policy = pytest.mark.parametrize("policy", BLOCK_POLICIES)


def configured(policy: str, changes: dict[str, Any]) -> Config:
    return small_config({**SHAPE, **changes, "activation_checkpoint.policy": policy})


def check(config: Config, workload: Workload) -> int:
    trace = simulate(config, workload)
    peak = int(trace.live_bytes[trace.peak_event(STEADY)])
    assert measured_peak(config, workload) == peak, first_departure(config, workload)
    return peak


@each_policy
@pytest.mark.parametrize(("family", "dropout"), FAST)
def test_the_transformer(policy: str, family: str, dropout: float) -> None:
    config = configured(policy, {**FAMILIES[family], "model.dropout": dropout})
    check(config, transformer_workload(config))


@pytest.mark.slow
@each_policy
@pytest.mark.parametrize("family", FAMILIES)
def test_more_transformers(policy: str, family: str) -> None:
    config = configured(policy, {**FAMILIES[family], "model.dropout": 0.1 if family in ("gpt", "latent") else 0.0})
    check(config, transformer_workload(config))


@pytest.mark.slow
@each_policy
def test_accumulation(policy: str) -> None:
    config = configured(policy, {"training.gradient_accumulation_steps": 3, "model.dropout": 0.1})
    check(config, transformer_workload(config))


@pytest.mark.slow
@each_policy
def test_a_model_of_another_maker(policy: str) -> None:
    config = small_config({"activation_checkpoint.policy": policy})
    check(config, gpt2())


def test_a_plan() -> None:
    config = configured("plan", {"activation_checkpoint.plan": "full+attention+save_matmuls+none"})
    check(config, transformer_workload(config))


@pytest.mark.parametrize(("family", "dropout"), [*FAST, ("autocast", 0.0)])
def test_a_plan_of_operations(family: str, dropout: float) -> None:
    plan = "full+save:attention-1.mm-1-4.addmm-1-4+2*save:mm-2.addmm-2.gelu-1.silu-1.mul-3"
    config = configured("plan", {**FAMILIES[family], "model.dropout": dropout, "activation_checkpoint.plan": plan})
    check(config, transformer_workload(config))


def test_the_policies_differ() -> None:
    """Else a test above could pass by looking elsewhere; what keeps more holds more."""

    def peak(policy: str) -> int:
        config = configured(policy, {})
        trace = simulate(config, transformer_workload(config))
        return int(trace.live_bytes[trace.peak_event(STEADY)])

    none, full = peak("none"), peak("full")
    others = ["save_attention", "save_every_other_matmul", "save_matmuls", "attention", "mlp"]
    between = [peak(policy) for policy in others]
    assert full < min(between)
    assert max(between) < none
    assert len(set(between)) == len(between)
    assert between[:3] == sorted(between[:3])


@each_policy
def test_a_deep_model_follows_from_shallow_ones(policy: str) -> None:
    config = configured(policy, {"model.n_layers": 9, "model.d_model": 16, "model.context_length": 16})
    workload = transformer_workload(config)
    found, full = simulate_deep(config, workload), simulate(config, workload)
    assert found.depths
    assert (found.trace.live_bytes == full.live_bytes).all()
