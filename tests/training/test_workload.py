from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_runs import CPU, copies, same_bits, small_config
from torch import nn

import bptool
from bptool.interop.huggingface import save_weights
from bptool.model.transformer import build
from bptool.training.assembly import build_model
from bptool.training.workload import Workload, longest_module_list, one, transformer_workload


def test_random_tokens_and_the_tokens_that_follow_them() -> None:
    workload = transformer_workload(small_config({"training.micro_batch_size": 3, "training.sequence_length": 7}))
    batch = workload.batch(torch.Generator().manual_seed(1))
    assert batch["tokens"].shape == batch["targets"].shape == (3, 7)
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert 0 <= int(batch["tokens"].min()) <= int(batch["tokens"].max()) < 32
    again, other = (workload.batch(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert same_bits(batch, again)
    assert not same_bits(batch, other)
    assert workload.weight(batch) == 21
    assert workload.unit == "tokens"


@pytest.mark.parametrize("loss", ["fused", "plain"])
def test_an_untrained_model_guesses(loss: str) -> None:
    workload = transformer_workload(small_config({"training.loss": loss}))
    batch = workload.batch(torch.Generator().manual_seed(1))
    assert workload.loss(workload.model(), batch).item() == pytest.approx(math.log(32), abs=0.05)


def test_the_model_begins_from_the_weights_that_are_named(tmp_path: Path) -> None:
    config = small_config()
    stored = build(config.model, device="cpu", seed=99)
    save_weights(stored.state_dict(), config.model, tmp_path)
    workload = transformer_workload(small_config({"model.weights": str(tmp_path)}))
    assert same_bits(copies(build_model(workload, CPU, torch.float32).state_dict()), stored.state_dict())
    assert next(build_model(workload, torch.device("meta"), torch.float32).parameters()).is_meta


def test_the_blocks_are_what_is_repeated() -> None:
    workload = transformer_workload(small_config({"model.n_layers": 3}))
    model = workload.model()
    assert [name for name, module in model.named_modules() if module in workload.blocks(model)] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]


def test_the_blocks_of_a_users_model_are_its_longest_list() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList(nn.ReLU() for _ in range(4)), nn.Sequential(nn.Tanh()))
    assert [type(block) for block in longest_module_list(model)] == [nn.ReLU] * 4
    assert longest_module_list(nn.Sequential(nn.Linear(2, 2))) == []


def test_the_public_name() -> None:
    assert bptool.Workload is Workload
    assert one({"anything": 1}) == 1
