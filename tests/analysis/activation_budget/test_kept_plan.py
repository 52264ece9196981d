"""A run's plan is found once, and anew where it was found for something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_config

from bptool.analysis.activation_budget.kept_plan import PLAN, settled_once
from bptool.analysis.activation_budget.operation_costs import Estimated
from bptool.analysis.machine import THIS_CPU
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.training.run_folder import RunFolder
from bptool.training.workload import transformer_workload

BUDGET: dict[str, Any] = {"activation_checkpoint.policy": "budget", "activation_checkpoint.budget": "600KiB"}
COSTS = Estimated(None, "fp32")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    config = small_config({"run.directory": str(tmp_path), "run.name": "one"})
    with RunFolder.create(config, force=False) as opened:
        yield opened


def plan_of(folder: RunFolder, config: Config, *, resumed: bool) -> str:
    found = settled_once(folder, config, transformer_workload(config), THIS_CPU, COSTS, resumed=resumed)
    chosen = found.config.activation_checkpoint
    return chosen.plan if chosen.policy == "plan" else chosen.policy


def config_of(changes: dict[str, Any] | None = None) -> Config:
    return small_config({"model.n_layers": 4, "training.micro_batch_size": 4, **BUDGET, **(changes or {})})


def test_it_is_kept_and_taken_again(folder: RunFolder) -> None:
    first = plan_of(folder, config_of(), resumed=False)
    kept = json.loads((folder.path / PLAN).read_text())
    kept["plan"] = "3*full+1*none"  # as other times would have it
    folder.write(PLAN, kept)
    assert first != "3*full+1*none"
    assert plan_of(folder, config_of(), resumed=True) == "3*full+1*none"
    assert plan_of(folder, config_of({"training.steps": 7, "optimizer.lr": 1e-2}), resumed=True) == "3*full+1*none"
    assert plan_of(folder, config_of(), resumed=False) == first


@pytest.mark.parametrize(
    "change",
    [
        {"activation_checkpoint.budget": "700KiB"},
        {"training.micro_batch_size": 2},
        {"training.sequence_length": 8},
        {"precision.mode": "bf16-mixed"},
        {"training.loss": "plain"},
        {"training.compile": True},
    ],
    ids=str,
)
def test_for_other_settings_it_is_found_anew(folder: RunFolder, change: dict[str, Any]) -> None:
    plan_of(folder, config_of(), resumed=False)
    kept = json.loads((folder.path / PLAN).read_text())
    folder.write(PLAN, kept | {"plan": "4*offload"})
    assert plan_of(folder, config_of(change), resumed=True) != "offload"
    assert json.loads((folder.path / PLAN).read_text())["settings"] != kept["settings"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"plan": "3*ful"}', '{"plan": 3}'])
def test_a_file_that_is_no_plan_is_written_anew(folder: RunFolder, content: str) -> None:
    (folder.path / PLAN).write_text(content)
    assert plan_of(folder, config_of(), resumed=True)
    assert "settings" in json.loads((folder.path / PLAN).read_text())


def test_without_a_budget_nothing_is_kept(folder: RunFolder) -> None:
    config = override(config_of(), {"activation_checkpoint.policy": "full"})
    assert plan_of(folder, config, resumed=False) == "full"
    assert not (folder.path / PLAN).exists()
