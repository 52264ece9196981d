"""The extended record against the full simulation, event by event."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from small_runs import small_config

from bptool.analysis.like_blocks import Blocks, Stretch, shallow_models
from bptool.analysis.machine import Machine
from bptool.analysis.memory.depth import Extended, extended, same
from bptool.analysis.memory.estimate import counted
from bptool.analysis.memory.result import module_bytes, readings
from bptool.analysis.memory.simulation import simulate, simulate_deep
from bptool.config.block_plan import parse_plan
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.gpus import gpu_named
from bptool.instruments.memory.trace import MemoryTrace
from bptool.training.workload import transformer_workload

A100 = Machine(gpu_named("a100-40gb"))
GRID: list[dict[str, Any]] = [
    {},
    {"optimizer.implementation": "loop"},
    {"optimizer.implementation": "foreach"},
    {"optimizer.name": "adafactor"},
    {"optimizer.name": "muon"},
    {"optimizer.name": "sgd", "optimizer.implementation": "foreach"},
    {"optimizer.name": "gradient-descent", "training.clip_norm": 0.0},
    {"activation_checkpoint.policy": "full", "model.dropout": 0.1},
    {"activation_checkpoint.policy": "full", "training.gradient_accumulation_steps": 3},
    {"activation_checkpoint.policy": "every_k"},
    {"model.attention": "eager", "training.loss": "plain"},
    {"precision.mode": "bf16-mixed", "model.norm": "layernorm", "model.bias": True},
    {"precision.mode": "bf16-mixed", "activation_checkpoint.policy": "every_k", "model.bias": True},
    {"precision.mode": "bf16-mixed", "activation_checkpoint.policy": "every_k"},
    {"precision.mode": "bf16", "model.position": "learned", "model.tied_embeddings": False},
    {"model.moe.n_experts": 4, "model.moe.n_active": 2, "model.moe.d_expert": 16, "model.moe.n_dense_layers": 2},
    {"model.sliding_window": 4, "model.sliding_window_pattern": 2},
    {"model.norm": "none", "model.residual": False, "optimizer.name": "adam", "optimizer.implementation": "loop"},
]


def deep(changes: dict[str, Any], n_layers: int) -> Config:
    return small_config({**changes, "model.n_layers": n_layers})


@pytest.mark.parametrize("changes", GRID, ids=lambda changes: " ".join(map(str, changes.values())) or "default")
def test_it_is_the_full_record(changes: dict[str, Any]) -> None:
    config = deep(changes, 10)
    workload = transformer_workload(config)
    found = simulate_deep(config, workload)
    assert found.depths
    full = simulate(config, workload)
    assert same(found.trace, full)
    assert (found.trace.live_bytes == full.live_bytes).all()


@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_a_shallow_model_is_simulated_itself(n_layers: int) -> None:
    config = deep({}, n_layers)
    workload = transformer_workload(config)
    found = simulate_deep(config, workload)
    assert found.depths == ()
    assert same(found.trace, simulate(config, workload))


PLANS = [
    "8*full+8*none",
    "7*full+9*save_matmuls+2*none",
    "full+9*none",
    "9*none+full",
    "8*attention+mlp+8*save_attention",
    "9*offload+8*save_every_other_matmul",
]


@pytest.mark.parametrize("changes", [{}, {"model.dropout": 0.1, "optimizer.implementation": "foreach"}], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_each_stretch_of_a_plan_is_extended(plan: str, changes: dict[str, Any]) -> None:
    checked = {"activation_checkpoint.policy": "plan", "activation_checkpoint.plan": plan}
    config = deep({**changes, **checked}, len(parse_plan(plan)))
    workload = transformer_workload(config)
    found = simulate_deep(config, workload)
    assert found.depths
    assert max(found.depths) < config.model.n_layers
    assert same(found.trace, simulate(config, workload))


LONG_PLANS = [{"activation_checkpoint.policy": "plan", "activation_checkpoint.plan": "30*full+31*none"}]


class TestBundles:
    """Of a very deep model few blocks are written out: no figure changes, and the record is no longer for it."""

    @staticmethod
    def both(changes: dict[str, Any], n_layers: int) -> tuple[Extended, MemoryTrace]:
        config = deep(changes, n_layers)
        models = shallow_models(config, transformer_workload(config))
        assert models
        simulated = cache(lambda lengths: simulate(*models.of(lengths)))
        whole = extended(models.blocks, simulated, most=10**6)
        assert whole.beyond is None
        return extended(models.blocks, simulated, most=8), whole.trace

    @pytest.mark.parametrize("changes", [*GRID, *LONG_PLANS], ids=lambda c: " ".join(map(str, c.values())) or "default")
    def test_every_reading_is_that_of_the_record_without_them(self, changes: dict[str, Any]) -> None:
        found, whole = self.both(changes, 61)
        assert found.beyond is not None
        assert len(found.trace.events) < len(whole.events) / 2
        assert readings(found.trace) == readings(whole)
        assert {m.name: m for m in module_bytes(found.trace)} == {m.name: m for m in module_bytes(whole)}
        assert same(found.whole(), whole)

    def test_modules_are_told_block_by_block(self) -> None:
        found, whole = self.both({}, 61)
        assert [module.name for module in module_bytes(found.trace)] == [m.name for m in module_bytes(whole)]

    def test_the_record_does_not_grow_with_depth(self) -> None:
        (few, _), (many, _) = (self.both({}, n_layers) for n_layers in (61, 122))
        assert len(few.trace.events) == len(many.trace.events)

    def test_reserved_memory_and_the_allocators_blocks_follow_too(self) -> None:
        """Within what is asked of a prediction for a GPU: 1% of allocated and 3% of reserved memory."""
        changes = {"model.d_model": 128, "model.n_heads": 4, "model.n_kv_heads": 4, "model.d_ff": 512}
        config = deep(changes, 150)
        models = shallow_models(config, transformer_workload(config))
        assert models
        simulated = cache(lambda lengths: simulate(*models.of(lengths), A100))
        ours, whole = (counted(extended(models.blocks, simulated, most=most), A100) for most in (32, 10**6))
        assert ours.whole
        assert ours.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)
        assert ours.reserved_bytes == pytest.approx(whole.reserved_bytes, rel=0.03)


@pytest.mark.parametrize("stretch", [Stretch(1000), Stretch(999, head=2), Stretch(501, head=1, period=4)], ids=str)
def test_an_outline_holds_each_block_once(stretch: Stretch) -> None:
    blocks = Blocks((Stretch(3), stretch))
    outline = blocks.outline(32)
    told = [number for bundle in outline.bundles.values() for number in bundle.numbers]
    assert sorted([*outline.numbers, *told]) == list(range(3 + stretch.n_layers))
    assert sum(outline.lengths) == len(outline.numbers) <= 3 + 32
    assert all(len(bundle.numbers) % stretch.period == 0 for bundle in outline.bundles.values())


def test_a_plan_that_changes_with_each_block_is_simulated_itself() -> None:
    plan = {"activation_checkpoint.policy": "plan", "activation_checkpoint.plan": "+".join(["full", "none"] * 4)}
    config = deep(plan, 8)
    workload = transformer_workload(config)
    assert simulate_deep(config, workload).depths == ()


def test_depths_are_whole_periods_apart() -> None:
    blocks = Blocks((Stretch(126, head=1, period=4),))
    (low,), (high,), (deepest,) = blocks.shortened(0), blocks.shortened(0, last=1), blocks.shortened(1, last=2)
    assert (high - low, deepest - high) == (4, 4)
    assert (126 - low) % 4 == 0


class TestWhereLayersDiffer:
    """Then nothing is extended: the full simulation's record comes back, and no depths are named."""

    @staticmethod
    def found(of_depth: Any, n_layers: int = 7) -> tuple[MemoryTrace, MemoryTrace, tuple[int, ...]]:
        result = extended(Blocks((Stretch(n_layers),)), lambda lengths: of_depth(sum(lengths)))
        return result.trace, of_depth(n_layers), result.depths

    def test_every_other_block_is_recomputed_and_the_period_is_not_told(self) -> None:
        config = deep({"activation_checkpoint.policy": "every_k"}, 7)

        def of_depth(n_layers: int) -> MemoryTrace:
            return simulate(config, transformer_workload(override(config, {"model.n_layers": n_layers})))

        ours, full, depths = self.found(of_depth)
        assert depths == ()
        assert same(ours, full)

    def test_a_width_that_grows_with_depth(self) -> None:
        config = deep({}, 7)

        def of_depth(n_layers: int) -> MemoryTrace:
            changes = {"model.n_layers": n_layers, "model.d_ff": 32 * n_layers}
            return simulate(config, transformer_workload(override(config, changes)))

        ours, full, depths = self.found(of_depth)
        assert depths == ()
        assert same(ours, full)

    def test_a_difference_that_the_third_depth_alone_shows(self) -> None:
        config = deep({}, 7)

        def of_depth(n_layers: int) -> MemoryTrace:
            changes = {"model.n_layers": n_layers, "training.micro_batch_size": 2 if n_layers < 5 else 3}
            return simulate(config, transformer_workload(override(config, changes)))

        ours, full, depths = self.found(of_depth)
        assert depths == ()
        assert same(ours, full)


def test_records_differ_by_a_single_byte() -> None:
    config = deep({}, 2)
    trace = simulate(config, transformer_workload(config))
    last = len(trace.allocations) - 1
    changed = [replace(a, n_bytes=a.n_bytes + (i == last)) for i, a in enumerate(trace.allocations)]
    assert same(trace, trace)
    assert not same(trace, MemoryTrace(changed, trace.events))
