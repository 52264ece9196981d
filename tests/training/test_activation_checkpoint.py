from __future__ import annotations

from typing import Any

import pytest
import torch
from small_runs import random_batches, same_bits, small_config, transformer_step
from torch import Tensor

from bptool.config.schema import ActivationCheckpointSettings
from bptool.training.activation_checkpoint import recomputed_blocks
from bptool.training.step import TrainStep

POLICIES: list[tuple[dict[str, object], list[int]]] = [
    ({"activation_checkpoint.policy": "none"}, []),
    ({"activation_checkpoint.policy": "full"}, [0, 1, 2, 3, 4]),
    ({"activation_checkpoint.policy": "every_k"}, [0, 2, 4]),
    ({"activation_checkpoint.policy": "every_k", "activation_checkpoint.every": 3}, [0, 3]),
    ({"activation_checkpoint.policy": "every_k", "activation_checkpoint.every": 9}, [0]),
]


def step_of(changes: dict[str, object]) -> TrainStep:
    return transformer_step(small_config({"model.n_layers": 5, "model.dropout": 0.2, **changes}))


def gradient(step: TrainStep) -> dict[str, Tensor]:
    torch.manual_seed(5)  # of the dropout
    step.accumulate(random_batches(step, 1, 2), [1, 1])
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("changes", "blocks"), POLICIES)
def test_which_blocks(changes: dict[str, Any], blocks: list[int]) -> None:
    """By the settings, and by how often a block's attention really runs in one forward and backward."""
    settings = ActivationCheckpointSettings(**{key.rpartition(".")[2]: value for key, value in changes.items()})
    assert recomputed_blocks(5, settings) == blocks

    step, runs = step_of(changes), [0] * 5

    def count(index: int) -> None:
        runs[index] += 1

    for index, block in enumerate(step.workload.blocks(step.model)):
        attention = block.get_submodule("attention")
        attention.register_forward_pre_hook(lambda module, inputs, index=index: count(index))
    step.accumulate(random_batches(step, 1), [1])
    assert runs == [2 if index in blocks else 1 for index in range(5)]


@pytest.mark.parametrize("changes", [changes for changes, _ in POLICIES[1:]])
def test_the_gradient_is_the_same_to_the_bit_though_there_is_dropout(changes: dict[str, Any]) -> None:
    plain = gradient(step_of({}))
    assert same_bits(gradient(step_of(changes)), plain)


def test_dropout_was_on() -> None:
    step = step_of({})
    first = {name: value.clone() for name, value in gradient(step).items()}
    step.optimizers.zero_grad()
    torch.manual_seed(6)
    step.accumulate(random_batches(step, 1, 2), [1, 1])
    assert not same_bits({n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}, first)


def test_parameters_keep_the_plain_models_names() -> None:
    plain, full = step_of({}), step_of(POLICIES[1][0])
    assert list(full.model.state_dict()) == list(plain.model.state_dict())
    assert [name for name, _ in full.model.named_parameters()] == [name for name, _ in plain.model.named_parameters()]
