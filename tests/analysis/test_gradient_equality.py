from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign_models import gpt2
from small_runs import small_config
from torch import Tensor, nn

from bptool.analysis.gradient_equality import changed_by_recomputation
from bptool.config.block_plan import BLOCK_POLICIES
from bptool.training.workload import Workload, transformer_workload


class Counting(nn.Module):
    """Scales by how often it was called: a recomputation scales by more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = torch.tanh(self.linear(x)) * self.calls
        return y.sin()


def own(block: type[nn.Module]) -> Workload:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), block(), nn.Linear(4, 4))

    return Workload(
        model,
        lambda generator: torch.randn(8, 4, generator=generator),
        lambda model, x: F.mse_loss(model(x), x),
        blocks=lambda model: [model.get_submodule("1")],
    )


def changed(policy: str, workload: Workload) -> list[str]:
    return changed_by_recomputation(small_config({"activation_checkpoint.policy": policy}), workload)


@pytest.mark.parametrize("policy", BLOCK_POLICIES)
def test_nothing_is_changed_where_blocks_can_be_repeated(policy: str) -> None:
    config = small_config({"activation_checkpoint.policy": policy, "model.dropout": 0.2})
    assert changed_by_recomputation(config, transformer_workload(config)) == []


def test_also_with_a_budget_and_for_a_model_of_another_maker() -> None:
    budget = {"activation_checkpoint.policy": "budget", "activation_checkpoint.budget": "40KiB"}
    config = small_config({**budget, "precision.mode": "bf16-mixed", "model.dropout": 0.2})
    assert changed_by_recomputation(config, transformer_workload(config)) == []
    assert changed("full", gpt2()) == []


def test_a_block_that_counts_its_calls_is_found() -> None:
    assert changed("none", own(Counting)) == []
    assert {"0.weight", "1.linear.weight"} <= set(changed("full", own(Counting)))


def test_also_where_a_recomputation_is_felt_by_the_next_forward_alone() -> None:
    """The backward of a product with a number has that number from the first forward."""

    class Growing(Counting):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + torch.tanh(self.linear(x)) * (1 + 0.1 * self.calls)

    assert changed("none", own(Growing)) == []
    assert "1.linear.weight" in changed("full", own(Growing))


def test_so_are_the_statistics_of_a_batch_norm() -> None:
    """Its gradients are right, and its running means have seen the batch twice."""

    class Normed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())

    assert changed("full", own(Normed)) == ["1.1.running_mean", "1.1.running_var", "1.1.num_batches_tracked"]
    assert changed("none", own(Normed)) == []
