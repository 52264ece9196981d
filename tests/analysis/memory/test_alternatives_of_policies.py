"""What the alternatives say of recomputation where a part of the blocks is recomputed already, and of master copies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_runs import question_of, small_config

from bptool.analysis.machine import Machine
from bptool.analysis.memory.alternatives import nearest_fitting, what_if
from bptool.analysis.memory.fit import predict_peak
from bptool.analysis.memory.result import Fitting
from bptool.config.overrides import override
from bptool.model.accounting import block_flops_per_token, count_parameters, flops_per_token
from bptool.training.workload import transformer_workload

SHAPE: dict[str, Any] = {"model.context_length": 64, "training.micro_batch_size": 8, "optimizer.name": "sgd"}


def share(settings: dict[str, Any]) -> float:
    """Of the nearest that fits in a little less: the same policy, and smaller micro-batches."""
    keys = {f"activation_checkpoint.{key}": value for key, value in settings.items()}
    config = small_config({**SHAPE, **keys})
    workload = transformer_workload(config)
    question = question_of(config, workload)
    machine = Machine(None, predict_peak(question).peak_bytes - 1)
    nearest = nearest_fitting(replace(question, machine=machine), wanted=3)
    found = next(one for one in nearest if one.settings[0].startswith("training.micro_batch_size="))
    assert isinstance(found, Fitting)
    return found.recompute_over_model_flops


def test_a_part_of_each_block_may_be_enough() -> None:
    """Before smaller micro-batches are: no product is repeated, and one micro-batch stays one."""
    config = small_config({**SHAPE, "model.d_ff": 512})
    question = question_of(config, transformer_workload(config))
    machine = Machine(None, predict_peak(question).peak_bytes - 1)
    (found,) = nearest_fitting(replace(question, machine=machine), wanted=1)
    assert found.settings == ["activation_checkpoint.policy=save_matmuls"]
    assert found.peak_allocated_bytes < machine.capacity_bytes  # type: ignore[operator]


def test_sublayers_add_up_to_the_block() -> None:
    config = small_config(SHAPE)
    block = block_flops_per_token(config.model, 0, 64)
    both = flops_per_token(config.model, 64) / 2  # two blocks
    assert share({"policy": "attention"}) == pytest.approx((block.attention_matrices + block.scores) / both)
    assert share({"policy": "mlp"}) == pytest.approx(block.feed_forward / both)
    assert share({"policy": "full"}) == pytest.approx(block.total / both)
    assert share({"policy": "save_attention"}) == pytest.approx((block.total - block.scores) / both)
    assert share({"policy": "plan", "plan": "full+mlp"}) == pytest.approx((block.total + block.feed_forward) / both / 2)


@pytest.mark.parametrize("policy", ["none", "save_matmuls", "offload"])
def test_no_product_is_repeated(policy: str) -> None:
    assert share({"policy": policy}) == 0


def test_master_copies_could_be_done_without() -> None:
    """Without float32 copies and with 16-bit state: 8 bytes a parameter less."""
    rounding = {"precision.mode": "bf16", "precision.bf16_update": "master", "optimizer.name": "adamw"}
    question = question_of(small_config({**SHAPE, **rounding}))
    (found,) = (one for one in what_if(question) if one.settings == ["precision.bf16_update=stochastic"])
    n_parameters = count_parameters(question.config.model).total
    assert predict_peak(question).peak_bytes - found.peak_allocated_bytes == 8 * n_parameters
    without = override(question.config, {"precision.bf16_update": "stochastic"})
    assert not [one for one in what_if(question_of(without)) if one.settings[0].startswith("precision")]
