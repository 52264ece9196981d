"""The trainer's step of models with windows, softcaps and experts: what it saves, recomputes, updates and predicts."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_runs import CPU, AtOptimizer, copies, question_of, run_steps, same_bits, small_config, transformer_step

from bptool.analysis.memory.fit import predict_peak
from bptool.instruments.memory.peak import PeakMemory
from bptool.training.assembly import capture, restore

EXPERTS = {"model.moe.n_experts": 4, "model.moe.d_expert": 16, "model.moe.n_shared": 1, "model.moe.router": "sigmoid"}
WINDOWS = {
    "model.sliding_window": 5,
    "model.sliding_window_pattern": 2,
    "model.attention_softcap": 5.0,
    "model.logit_softcap": 5.0,
    "model.norm": "rmsnorm-offset",
    "model.post_norm": True,
}
LATENT = {"model.mla.kv_rank": 8, "model.mla.q_rank": 8}
each_model = pytest.mark.parametrize("model", [EXPERTS, WINDOWS, LATENT], ids=["experts", "windows", "latent"])


@each_model
def test_it_learns(model: dict[str, Any]) -> None:
    step = transformer_step(small_config({**model, "optimizer.lr": 0.03, "model.vocab_size": 3}))
    ids = torch.tensor([[0, 1, 2] * 5 + [0]] * 2)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    losses = [step(number, [batch]).loss for number in range(60)]
    assert losses[0] > 1
    assert losses[-1] < 0.3


@each_model
def test_recomputation_changes_no_gradient(model: dict[str, Any]) -> None:
    found = []
    for policy in ("none", "full"):
        watch = AtOptimizer()
        step = transformer_step(small_config({**model, "activation_checkpoint.policy": policy}), watch)
        watch.model = step.model
        run_steps(step, 2)
        found.append(watch.gradients)
    assert same_bits(*found)


@each_model
def test_a_checkpoint_holds_all_that_goes_on(model: dict[str, Any]) -> None:
    config = small_config({**model, "optimizer.name": "muon"})
    first, second = transformer_step(config), transformer_step(config)
    for name, parameter in first.model.named_parameters():
        if not parameter.requires_grad:
            assert name.endswith("feed_forward.router.bias")
            parameter.fill_(0.5)
    run_steps(first, 2)
    stored = capture(first, 2, {})
    restore(second, replace(stored, model=copies(stored.model), optimizer=copies(stored.optimizer)))
    run_steps(first, 1)
    run_steps(second, 1)
    assert same_bits(copies(first.model.state_dict()), copies(second.model.state_dict()))


def test_muon_leaves_stacks_of_experts_to_adamw() -> None:
    step = transformer_step(small_config({**EXPERTS, "optimizer.name": "muon"}))
    run_steps(step, 1)
    kinds = {name.removeprefix("blocks.0.feed_forward.") for name in step.optimizers.state()}
    assert {"experts.up.weight/exp_avg", "router.weight/momentum_buffer", "shared.up.weight/momentum_buffer"} <= kinds


@each_model
@pytest.mark.parametrize("policy", ["none", "full"])
def test_the_predicted_peak_is_the_measured_one(model: dict[str, Any], policy: str) -> None:
    """But for the Python numbers that products save, 4 or 8 bytes each."""
    shape = {"model.d_model": 64, "model.d_ff": 128, "model.context_length": 32, "model.vocab_size": 128}
    config = small_config({**model, **shape, "activation_checkpoint.policy": policy})
    gc.collect()
    step = transformer_step(config)
    memory = PeakMemory(CPU, step.persistent_tensors)
    step.announcer.instruments.append(memory)
    run_steps(step, 2)
    assert memory.peak_bytes is not None
    assert 0 <= memory.peak_bytes - predict_peak(question_of(config)).peak_bytes <= 100
