"""Identities of a training step: each fails, alone, where the step is broken there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from identity_checks import SquaresOnce, failed, named, of_transformer
from small_runs import masked_regression, small_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bptool.analysis.gradcheck.identities.check import check_identities
from bptool.training import activation_checkpoint
from bptool.training.optimizers import GradientDescent
from bptool.training.step import TrainStep
from bptool.training.workload import Batch, Workload


class TestAccumulation:
    def test_a_mean_of_means(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = TrainStep.accumulate
        monkeypatch.setattr(TrainStep, "accumulate", lambda step, parts, weights: right(step, parts, [1] * len(parts)))
        assert failed(of_transformer()) == ["accumulation"]

    def test_a_last_micro_batch_that_is_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = TrainStep.accumulate

        def lost(step: TrainStep, parts: Sequence[Batch], weights: Sequence[int]) -> Tensor:
            return right(step, parts[:2], weights[:2])

        monkeypatch.setattr(TrainStep, "accumulate", lost)
        assert failed(of_transformer()) == ["accumulation"]

    def test_a_users_weight_that_counts_all_rows(self) -> None:
        """Left out with the reason where nothing is accumulated, wrong where something is."""
        workload = replace(masked_regression(), weight=lambda batch: len(batch["valid"]))
        found = check_identities(small_config(), workload, built_in=False, seed=1)
        assert failed(found) == []
        (reason,) = (text for text in found.left_out if text.startswith("accumulation"))
        assert "`weight` is not what the loss averages over" in reason
        several = small_config({"training.gradient_accumulation_steps": 2})
        assert failed(check_identities(several, workload, built_in=False, seed=1)) == ["accumulation"]


class TestTheStep:
    def test_a_recomputation_that_fails(self) -> None:
        """As where a backward reads what was saved twice."""

        workload = Workload(
            model=lambda: nn.Sequential(SquaresOnce(), SquaresOnce()),
            batch=lambda generator: torch.randn(4, 3, generator=generator),
            loss=lambda model, batch: model(batch).square().mean(),
        )
        found = check_identities(small_config(), workload, built_in=False, seed=0)
        assert failed(found) == ["activation_checkpointing"]
        assert "policy full raises CheckpointError" in named(found.identities, "activation_checkpointing").detail

    def test_a_recomputation_of_a_block_that_keeps_a_cache(self) -> None:
        """As a language model that keeps its keys for generation: again, a block meets its own keys twice."""

        class Remembers(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)
                self.seen: list[Tensor] = []

            def forward(self, x: Tensor) -> Tensor:
                self.seen.append(self.layer(x))
                keys = torch.cat(self.seen) if len(self.seen) > 1 else self.seen[0]
                return (x @ keys.mT) @ keys

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            for block in model.modules():
                if isinstance(block, Remembers):
                    block.seen.clear()
            result: Tensor = model(batch).square().mean()
            return result

        workload = Workload(
            model=lambda: nn.Sequential(Remembers(), Remembers()),
            batch=lambda generator: torch.randn(4, 3, generator=generator),
            loss=loss,
        )
        found = check_identities(small_config(), workload, built_in=False, seed=0)
        assert failed(found) == ["activation_checkpointing"]
        detail = named(found.identities, "activation_checkpointing").detail
        assert "raises" in detail
        assert "keeps nothing from call to call" in detail

    def test_a_recomputation_that_draws_other_dropout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(activation_checkpoint, "checkpoint", partial(checkpoint, preserve_rng_state=False))
        found = of_transformer()
        assert failed(found) == ["activation_checkpointing"]
        assert "policy full" in named(found.identities, "activation_checkpointing").detail

    @pytest.mark.parametrize(
        "norm",
        [
            lambda tensors: torch.stack([t.norm() for t in tensors]).sum(),
            lambda tensors: torch.stack([t.norm() for t in tensors]).max(),
            lambda tensors: torch.stack([t.norm() for t in tensors[1:]]).norm(),
        ],
        ids=["sum of norms", "largest norm", "one tensor less"],
    )
    def test_another_norm(self, monkeypatch: pytest.MonkeyPatch, norm: Callable[[list[Tensor]], Tensor]) -> None:
        monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)
        assert failed(of_transformer()) == ["clipping_norm"]

    @pytest.mark.parametrize("eps", [0.0, 1e-5])
    def test_another_epsilon(self, monkeypatch: pytest.MonkeyPatch, eps: float) -> None:
        def rescale(step: TrainStep, norm: float) -> None:
            factor = min(1.0, step._clip_norm / (norm + eps)) if step._clip_norm else 1.0
            torch._foreach_mul_(step._gradients(), factor)

        monkeypatch.setattr(TrainStep, "_rescale", rescale)
        assert failed(of_transformer()) == ["clipping_norm"]

    @pytest.mark.parametrize("factor", [1 + 1e-6, -1.0])
    def test_another_update(self, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
        def step(optimizer: GradientDescent) -> None:
            for group in optimizer.param_groups:
                for theta in group["params"]:
                    theta.data.sub_(group["lr"] * factor * theta.grad)

        monkeypatch.setattr(GradientDescent, "step", step)
        assert failed(of_transformer()) == ["gradient_descent_update"]
