"""A user's large model: its micro-batch is cut where that can be, and that is said; a long wait is announced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bptool import GradientTarget, Workload
from bptool.analysis.gradcheck import workloads
from bptool.analysis.gradcheck.check import examine
from bptool.analysis.gradcheck.workloads import affordable, workload_target


def a_workload(rows: int = 8, **more: Tensor) -> Workload:
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        found: Tensor = model(batch["x"]).square().mean()
        return found

    def batch(generator: torch.Generator) -> dict[str, Any]:
        return {"x": torch.randn(rows, 3, generator=generator), "words": "no tensor", **more}

    return Workload(model=lambda: nn.Linear(3, 2), batch=batch, loss=loss)


def cut(workload: Workload) -> tuple[Workload, GradientTarget, list[str]]:
    return affordable(workload, workload_target(workload, seed=1))


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "MOST_PARAMETERS", 4)


def test_the_first_rows_stay_and_it_is_said() -> None:
    whole = a_workload()
    fewer, target, sentences = cut(whole)
    assert sentences == ["the micro-batch from 8 rows to 2"]
    (batch,) = target.inputs
    (before,) = workload_target(whole, seed=1).inputs
    assert torch.equal(batch["x"], before["x"][:2])
    assert batch["words"] == "no tensor"
    assert fewer.batch(torch.Generator())["x"].shape == (2, 3)
    assert fewer.loss is whole.loss


@pytest.mark.parametrize(
    "workload",
    [
        a_workload(rows=2),
        a_workload(mask=torch.ones(5, 5)),
        a_workload(scale=torch.tensor(2.0)),
    ],
    ids=["few rows", "a tensor with other rows", "a scalar"],
)
def test_what_cannot_be_cut_is_as_it_is(workload: Workload) -> None:
    target = workload_target(workload, seed=1)
    assert affordable(workload, target) == (workload, target, [])


def test_a_loss_that_counts_on_its_rows_is_as_it_is() -> None:
    fixed = a_workload()
    workload = Workload(
        model=fixed.model,
        batch=fixed.batch,
        loss=lambda model, batch: (model(batch["x"]) * torch.ones(8, 1, dtype=torch.float64)).sum(),
    )
    target = workload_target(workload, seed=1)
    assert affordable(workload, target) == (workload, target, [])


def test_a_small_model_is_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "MOST_PARAMETERS", 8)
    assert cut(a_workload())[2] == []


def test_random_state_is_as_it_was() -> None:
    target = workload_target(a_workload(), seed=1)
    before = torch.get_rng_state()
    affordable(a_workload(), target)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_pass_takes_is_told_before_anything_is_measured() -> None:
    calls = [0]
    told: list[tuple[float, int, int]] = []

    def counting(x: Tensor) -> Tensor:
        calls[0] += 1
        return x.sin()

    target = GradientTarget(counting, (torch.randn(3, requires_grad=True),))
    # A copy of the function shares the list.
    examine(target, seed=1, expected=lambda pass_s, passes: told.append((pass_s, passes, calls[0])))
    ((pass_s, passes, before),) = told
    assert pass_s > 0
    assert passes > 0
    assert before < 10 < calls[0]
