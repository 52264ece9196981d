"""Compiled blocks: what they compute again is a part of what is compiled, and changes no gradient."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from compiled_steps import compiled_once
from small_runs import random_batches, same_bits, small_config, transformer_step
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bptool.config.schema import Config
from bptool.hardware import standing_in_for_cuda_tensors
from bptool.training import offload
from bptool.training.compiling import compile_blocks, recompute_compiled, recomputes_unseen
from bptool.training.selective import Chooser, Matmuls, Named

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
    """Of somebody else, which writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.mul_(2.0)
        result: Tensor = self.third(self.second(y.sin())) + x
        return result


class Breaking(Block):
    """Which no graph holds whole: it reads a value, and draws random numbers where nothing is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) * noise(x)
        if float(y.detach().sum()) > 1e9:
            return y
        result: Tensor = self.third(torch.tanh(self.second(y.sin()) * noise(x))) + x
        return result


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def noise(x: Tensor) -> Tensor:
    return torch.rand_like(x)


class Adapter(nn.Module):
    """Whose forward takes another module's place."""

    def __init__(self, inner: Block) -> None:
        super().__init__()
        self.inner, self.forward_of_inner = [inner], inner.forward

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.forward_of_inner(x) * self.inner[0].first.weight.sum()
        return result


def adapted() -> Block:
    block = Block()
    block.forward = Adapter(block).forward  # type: ignore[method-assign]
    return block


@pytest.mark.parametrize("make", [Block, Breaking, adapted])
@pytest.mark.parametrize(
    "chooser",
    [Matmuls, partial(Matmuls, every=2), partial(Named, frozenset({"rand_like-1", "mm-2"})), None],
    ids=["products", "every other", "named", "full"],
)
def test_blocks_of_others(make: Callable[[], Block], chooser: Callable[[], Chooser] | None) -> None:
    """Also those that the compiler leaves to Python recompute what they computed, with the same random numbers."""
    torch.manual_seed(2)
    block, x = make(), torch.randn(4, 8, requires_grad=True)

    def gradients() -> dict[str, Tensor]:
        block.zero_grad()
        torch.manual_seed(3)
        block(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}

    plain = gradients()
    recompute_compiled(block, chooser)
    compile_blocks([block], CPU)
    found = gradients()
    assert len(plain) == 3
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_what_is_recomputed_goes_with_its_module() -> None:
    block = adapted()
    recompute_compiled(block, None)
    known = weakref.ref(block)
    del block
    gc.collect()
    assert known() is None


def test_advice_that_is_followed_is_not_given(caplog: pytest.LogCaptureFixture) -> None:
    compile_blocks([], CPU)
    log = logging.getLogger("torch._higher_order_ops.wrap")
    with caplog.at_level(logging.WARNING, log.name):
        log.warning("\nDetected that context_fn is passed to torch.utils.checkpoint under torch.compile.")
        log.warning("anything else")
    assert [record.getMessage() for record in caplog.records if record.name == log.name] == ["anything else"]


@pytest.mark.parametrize(
    ("policy", "compiled", "expected"),
    [
        *(("full", True, True), ("full", False, False), ("none", True, False)),
        *(("plan:2*none", True, False), ("plan:1*none+1*offload", True, False), ("plan:1*none+1*mlp", True, True)),
    ],
)
def test_where_recomputation_is_no_phase(policy: str, compiled: bool, expected: bool) -> None:
    name, _, plan = policy.partition(":")
    settings = {"activation_checkpoint.policy": name, "activation_checkpoint.plan": plan}
    assert recomputes_unseen(small_config({**settings, "training.compile": compiled})) == expected
