"""Fake tensors' answers from memory against those of PyTorch's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.config
from small_runs import small_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bptool.analysis.machine import THIS_CPU, FakeTensors, Machine
from bptool.analysis.memory.depth import same
from bptool.analysis.memory.simulation import simulate
from bptool.gpus import GPUS
from bptool.training.workload import transformer_workload

SETTINGS: list[dict[str, Any]] = [
    {"training.gradient_accumulation_steps": 2, "precision.mode": "bf16-mixed"},
    {"optimizer.implementation": "foreach", "activation_checkpoint.policy": "full", "model.dropout": 0.1},
    {"optimizer.name": "adafactor", "model.moe.n_experts": 4, "model.moe.n_active": 2, "model.moe.d_expert": 16},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@pytest.mark.parametrize("machine", [THIS_CPU, Machine(GPUS["h100"])], ids=["cpu", "gpu"])
def test_what_is_looked_up_is_what_the_operation_makes(changes: dict[str, Any], machine: Machine) -> None:
    """PyTorch's own switch: nothing is looked up."""
    config = small_config(changes)
    workload = transformer_workload(config)
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        computed = simulate(config, workload, machine)
    FakeTensorMode.cache_clear()
    looked_up = simulate(config, workload, machine)
    assert FakeTensorMode.cache_info().hits > 100
    assert same(looked_up, computed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fake", [True, False], ids=["fake", "real"])
def test_what_a_gpus_normalisations_keep_of_each_row_is_float32(dtype: torch.dtype, fake: bool) -> None:
    """Looked up or not; a CPU's are in the input's dtype."""

    def statistics() -> set[torch.dtype]:
        x, ones = torch.ones(2, 4, 6, dtype=dtype), torch.ones(6, dtype=dtype)
        layer = [torch.ops.aten.native_layer_norm(x, [6], ones, ones, 1e-5) for _ in range(2)]
        group = torch.ops.aten.native_group_norm(x, ones[:4], ones[:4], 2, 4, 6, 2, 1e-5)
        assert {outputs[0].dtype for outputs in (*layer, group)} == {dtype}
        return {kept.dtype for outputs in (*layer, group) for kept in outputs[1:]}

    with Machine(GPUS["h100"], fake=fake).pretended():
        assert statistics() == {torch.float32}
    with Machine(fake=fake).pretended():
        assert statistics() == {dtype}


@pytest.mark.parametrize(
    "other",
    [
        lambda: torch.empty(4, 7),
        lambda: torch.empty(4, 6, dtype=torch.bfloat16),
        lambda: torch.empty(6, 4).t(),
        lambda: torch.empty(4, 6, requires_grad=True).detach(),
        lambda: torch.empty(25)[1:].view(4, 6),
        lambda: torch.empty(4, 6, device="meta"),
        lambda: torch.empty(4, 6, dtype=torch.complex64),
        lambda: torch.empty(4, 6, dtype=torch.complex64).conj(),
    ],
)
def test_other_arguments_are_other_questions(other: Any) -> None:
    """The same operation on a first tensor, then on another: the second answer is not the first's."""

    def answers() -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for make in (lambda: torch.empty(4, 6), other):
            x = make()
            results = [x.mul(2), x.mul(2.0), x.sum(0), x.sum(1), torch.cat([x, x]), torch.cat([x, x], dim=1), x[1:]]
            results += [
                x.to(torch.float64),
                x.to(torch.float16),
                x.to(torch.float64, memory_format=torch.preserve_format),
            ]
            for y in results:
                assert isinstance(y, FakeTensor)
                found.append((y.shape, y.stride(), y.dtype, y.storage_offset(), y.device, y.is_conj()))
        return found

    FakeTensorMode.cache_clear()
    with FakeTensors():
        ours = answers()
    FakeTensorMode.cache_clear()
    with FakeTensorMode():
        assert ours == answers()
