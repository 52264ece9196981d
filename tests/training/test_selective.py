"""What is saved where PyTorch asks, also for operations that only a GPU runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from bptool.errors import UsageError
from bptool.training.selective import Attention, Matmuls, Policy

aten = torch.ops.aten
FORWARD, AGAIN = (SelectiveCheckpointContext(is_recompute=again) for again in (False, True))
QKV = (None, None, None)
DROPPING = [
    (aten._scaled_dot_product_flash_attention.default, (*QKV, 0.1)),
    (aten._scaled_dot_product_efficient_attention.default, (*QKV, None, True, 0.1)),
    (aten._scaled_dot_product_cudnn_attention.default, (*QKV, None, True, 0.1)),
]


def saves(policy: Policy, func: Any, *args: Any, context: SelectiveCheckpointContext = FORWARD) -> bool:
    return policy(context, func, *args) is CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize(("func", "args"), DROPPING)
def test_what_is_dropped_after_attention_that_drops_is_saved_too(func: Any, args: tuple[Any, ...]) -> None:
    """A saved operation draws nothing the second time, and what comes after it would draw other numbers."""
    for context in (FORWARD, AGAIN):
        policy = Policy(Attention)
        assert not saves(policy, aten.native_dropout.default, context=context)
        assert saves(policy, func, *args, context=context)
        assert saves(policy, aten.native_dropout.default, context=context)


@pytest.mark.parametrize(("func", "args"), DROPPING)
def test_without_dropout_in_it_nothing_else_is(func: Any, args: tuple[Any, ...]) -> None:
    policy = Policy(Attention)
    assert saves(policy, func, *args[:-1], 0.0)
    assert not saves(policy, aten.native_dropout.default)


def test_random_numbers_that_are_written_in_place_cannot_be_saved() -> None:
    policy = Policy(Attention)
    assert not saves(policy, aten.bernoulli_.float, None, 0.5)
    assert saves(policy, *[DROPPING[0][0], *DROPPING[0][1]])
    with pytest.raises(UsageError, match="bernoulli_"):
        saves(policy, aten.bernoulli_.float, None, 0.5)


def test_every_other_product_counts_the_recomputation_by_itself() -> None:
    """PyTorch 2.11 asks again there; 2.13 does not."""
    policy = Policy(lambda: Matmuls(every=2))
    products = [aten.mm.default, aten.addmm.default, aten.bmm.default]
    assert [saves(policy, product) for product in products] == [True, False, True]
    assert [saves(policy, product, context=AGAIN) for product in products] == [True, False, True]
