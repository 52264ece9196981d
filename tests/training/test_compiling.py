"""Compiled blocks: what they compute again is a part of what is compiled, and changes no gradient."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_runs import random_batches, same_bits, small_config, transformer_step
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bptool.config.schema import Config
from bptool.hardware import standing_in_for_cuda_tensors
from bptool.instruments.memory.peak import noted_allocations
from bptool.training import offload
from bptool.training.compiling import compile_blocks, recompute_compiled, recomputes_unseen
from bptool.training.selective import Matmuls
from bptool.training.step import TrainStep

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # of torch.compile's own insides
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def planned(plan: str, changes: dict[str, Any]) -> Config:
    chosen = {"activation_checkpoint.policy": "plan", "activation_checkpoint.plan": plan, "training.compile": True}
    return small_config({"training.micro_batch_size": 4, **changes, **chosen})


def once(step: TrainStep) -> tuple[int, dict[str, Tensor]]:
    """Bytes that a forward holds for its backward, by the allocator's own events, and the gradients."""
    [batch] = random_batches(step, 1)
    step.optimizers.zero_grad()
    gc.collect()  # what is released in it must have come in it
    torch.manual_seed(5)
    with noted_allocations() as events:
        loss = step.workload.loss(step.model, batch)
    held = sum(events)
    loss.backward()
    return held, {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


def compiled_once(config: Config) -> tuple[int, dict[str, Tensor]]:
    """And then once more: the first time compiles, which allocates too."""
    step = transformer_step(config)
    once(step)
    return once(step)


def test_each_block_recomputes_in_its_own_way_and_the_gradient_stays() -> None:
    """Dropout's mask is the same the second time, and no block takes another's compiled code."""
    changes = {"model.n_layers": 5, "model.dropout": 0.2}
    everything, plain = compiled_once(planned("5*none", changes))
    before = counters["stats"]["unique_graphs"]
    held, found = compiled_once(planned("1*full+1*save:mm-3+1*mlp+1*full+1*none", changes))
    assert counters["stats"]["unique_graphs"] - before == 3, "one for each way that was not compiled yet"
    assert held < everything
    assert len(plain) > 5
    assert same_bits(plain, found)


def test_without_gradients_all_policies_are_one() -> None:
    step = transformer_step(planned("1*full+1*save:mm-3+1*save_matmuls", {"model.n_layers": 3}))
    [batch] = random_batches(step, 1)
    with torch.no_grad():
        step.workload.loss(step.model, batch)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_is_saved_is_what_is_named_and_nothing_else() -> None:
    """4 x 16 tokens; mm-3 gives 16 float32 for each, attention 16 and a logarithm for each of 2 heads.

    Attention that is computed again needs the random state as well, as it might drop something.
    """
    policies = ("full", "save:mm-3", "save:attention-1.mm-3")
    full, product, both = (compiled_once(planned(f"2*{policy}", {}))[0] for policy in policies)
    tokens, blocks = 4 * 16, 2
    assert product - full == blocks * tokens * 16 * 4
    assert both - product == blocks * (tokens * (16 + 2) * 4 - torch.get_rng_state().nbytes)


def test_what_a_compiled_block_saves_can_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that takes itself for a GPU; weights stay."""
    shapes: list[tuple[int, ...]] = []

    def to_host(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x.clone()

    monkeypatch.setattr(offload, "TO_HOST", to_host)
    wide = {"model.d_model": 64, "model.d_ff": 48}
    with standing_in_for_cuda_tensors():
        _, plain = compiled_once(planned("2*none", wide))
        assert not shapes
        _, found = compiled_once(planned("2*offload", wide))
    assert same_bits(plain, found)
    assert {(4, 16, 64), (4, 2, 16, 32)} <= set(shapes)
    assert (48, 64) not in shapes


class Block(nn.Module):
    """Of somebody else, whose forward is an instance's own and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.forward = self.twice

    def twice(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.mul_(2.0)
        result: Tensor = self.second(y.sin()) + x
        return result


def test_a_block_that_writes_in_place(caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch warns of it where it is compiled; nothing is in place by then, and the gradient is the plain one's."""
    torch.manual_seed(2)
    block, x = Block(), torch.randn(4, 8, requires_grad=True)
    block(x).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    recompute_compiled(block, Matmuls)
    with caplog.at_level(logging.WARNING):
        compile_blocks([block], CPU)
        block(x).square().sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])
    assert not [record for record in caplog.records if "context_fn" in record.getMessage()]


@pytest.mark.parametrize(
    ("policy", "compiled", "expected"), [("full", True, True), ("full", False, False), ("none", True, False)]
)
def test_where_recomputation_is_no_phase(policy: str, compiled: bool, expected: bool) -> None:
    config = small_config({"activation_checkpoint.policy": policy, "training.compile": compiled})
    assert recomputes_unseen(config) == expected
