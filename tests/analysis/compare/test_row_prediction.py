"""A row on fake tensors, beside the estimates that other commands make of the same step."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare_records import MODE, POLICY

from bptool.analysis.compare.entries import Prediction
from bptool.analysis.compare.grid import read_grid
from bptool.analysis.compare.prediction import Predictor
from bptool.analysis.memory.estimate import estimate, simulated
from bptool.analysis.profile.answers import profile
from bptool.analysis.profile.measuring import Plan

SMALL = ["model.n_layers=4", "model.d_model=32", "model.n_heads=2", "training.micro_batch_size=2"]
READS_VALUES = """
import torch
from bptool import Workload

def net():
    return Workload(
        model=lambda: torch.nn.Linear(4, 4),
        batch=lambda generator: torch.randn(2, 4, generator=generator),
        loss=lambda model, batch: model(batch).mean() * (2 if batch.sum().item() > 0 else 1),
    )
"""

OF_TWO_BLOCKS = """
import torch
from bptool import Workload

def net():
    return Workload(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)),
        batch=lambda generator: torch.randn(2, 4, generator=generator),
        loss=lambda model, batch: model(batch).mean(),
        blocks=lambda model: list(model),
    )
"""


def predictions(*words: str, target: str = "tiny", gpu: str | None = None) -> list[Prediction]:
    grid = read_grid(target, words, device="auto" if gpu else "cpu", gpu=gpu)
    predictor = Predictor()
    return [predictor.predict(i, row.question) for i, row in enumerate(grid.rows) if row.question]


@pytest.mark.parametrize("gpu", [None, "h100"])
def test_it_says_what_memory_estimate_and_profile_say(gpu: str | None) -> None:
    words = [*SMALL, f"{POLICY}=none,full"]
    grid = read_grid("tiny", words, device="auto" if gpu else "cpu", gpu=gpu)
    for found, row in zip(predictions(*words, gpu=gpu), grid.rows, strict=True):
        question = row.question
        assert question is not None
        memory = estimate(question, simulated(question.config, question.workload, question.machine))
        profiled = profile(question, Plan(measure=False)).result
        flops = profiled.flops
        every = flops.forward_flops + flops.dgrad_flops + flops.wgrad_flops + flops.recompute_flops
        assert found.status == "ok"
        assert found.peak_bytes == memory.peak_allocated_bytes
        assert found.total_bytes == memory.total_expected_bytes
        assert sum(found.category_bytes.values()) == found.peak_bytes
        assert found.category_bytes["activations"] == memory.at_peak.activations_bytes
        assert found.recompute_flops_share == flops.recompute_flops / every
        assert found.units == profiled.units_per_step
        if gpu:  # whose rates are not measured
            assert profiled.predicted is not None
            assert found.step_s == profiled.predicted.step_s
            seconds = {phase.phase: phase.predicted_s for phase in profiled.predicted.phases}
            assert (found.forward_s, found.backward_s) == (seconds["forward"], seconds["backward"])
            assert found.recompute_s == seconds.get("recompute", 0.0)


def test_recomputation_takes_time_and_saves_memory() -> None:
    none, full = predictions(*SMALL, f"{POLICY}=none,full")
    assert none.step_s is not None
    assert full.step_s is not None
    assert full.step_s > none.step_s
    assert (none.recompute_s, none.recompute_flops_share) == (0, 0)
    assert full.recompute_flops_share is not None
    assert 0.1 < full.recompute_flops_share < 0.25  # a quarter of all, but for what is outside of the blocks
    assert none.peak_bytes is not None
    assert full.peak_bytes is not None
    assert full.peak_bytes < none.peak_bytes


def test_a_budget_becomes_a_plan_that_is_told() -> None:
    (found, too_small) = predictions(*SMALL, f"{POLICY}=budget:5MiB,budget:1KiB")
    assert found.status == "ok"
    assert found.notes[0].startswith("activation_checkpoint.plan=")
    assert too_small.status == "unsupported"
    assert "activation_checkpoint.budget = 1KiB cannot be met" in too_small.reason


def test_what_does_not_fit_says_so_with_its_figures() -> None:
    small = [word for word in SMALL if "batch" not in word]
    (found,) = predictions(*small, "training.micro_batch_size=8192", f"{MODE}=fp32,bf16", gpu="t4")
    assert found.status == "out_of_memory"
    assert "14.56 GiB are there" in found.reason
    assert found.peak_bytes is not None


def test_what_fits_needs_no_more_than_is_there() -> None:
    """The allocator would reserve 79.97 GiB of the 79.1, and gives back what it only caches."""
    words = ["precision.mode=bf16", f"{POLICY}=budget:16GiB,none"]
    (found, none) = predictions(*words, target="llama3-8b", gpu="h100")
    assert (found.status, none.status) == ("ok", "out_of_memory")
    capacity = read_grid("llama3-8b", words, gpu="h100").machine.capacity_bytes
    assert capacity is not None
    assert found.total_bytes is not None
    assert found.total_bytes <= capacity
    assert none.total_bytes is not None
    assert none.total_bytes > capacity


def test_a_policy_for_other_blocks_than_the_models_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(OF_TWO_BLOCKS)
    (mlp, plan) = predictions(f"{POLICY}=mlp,plan:9*full", target=f"{tmp_path / 'net.py'}:net")
    assert (mlp.status, plan.status) == ("unsupported", "unsupported")
    assert "no module of a Linear is called so" in mlp.reason


def test_a_model_that_reads_values_fails_and_says_why(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(READS_VALUES)
    (found, _) = predictions(f"{MODE}=fp32,bf16", target=f"{file}:net")
    assert found.status == "failed"
    assert "without values" in found.reason
