from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import (
    CPU,
    AtOptimizer,
    Perceptron,
    Recorder,
    copies,
    joined,
    masked_regression,
    random_batches,
    run_steps,
    same_bits,
    small_config,
    transformer_step,
)
from torch import Tensor, nn

from bptool.training.assembly import build_step
from bptool.training.evaluation import evaluate
from bptool.training.instrument import Announcer, Instrument
from bptool.training.step import TrainStep
from bptool.training.workload import Batch, Workload


def regression_step(
    workload: Workload | None = None, *instruments: Instrument, clip_norm: float = 0.0, **changes: Any
) -> TrainStep:
    """Plain gradient descent with learning rate 1, so that an update is the gradient itself."""
    keys = {
        "optimizer.name": "gradient-descent",
        "optimizer.lr": 1.0,
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
        "training.clip_norm": clip_norm,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return build_step(small_config(keys), workload or masked_regression(), CPU, Announcer(instruments))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class TestAccumulation:
    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_micro_batches_give_the_gradient_of_one_batch(self, count: int) -> None:
        """Though they hold unequal numbers of valid rows: in float64, and against autograd by itself."""
        step = regression_step(masked_regression(torch.float64))
        batches = random_batches(step, 3, count)
        weights = [int(batch["valid"].sum()) for batch in batches]
        assert len(set(weights)) > 1

        step.accumulate(batches, weights)
        accumulated = gradients(step.model)
        step.optimizers.zero_grad()
        whole = joined(batches)
        error_N2 = (step.model(whole["x"]) - whole["y"])[whole["valid"]]
        error_N2.square().mean(1).mean().backward()  # over all the valid rows, divided once
        expected = gradients(step.model)
        for name in expected:
            torch.testing.assert_close(accumulated[name], expected[name], rtol=1e-12, atol=1e-14)

        step.optimizers.zero_grad()
        torch.stack([step.workload.loss(step.model, batch) for batch in batches]).mean().backward()
        means_of_means = gradients(step.model)
        assert any((means_of_means[name] - expected[name]).abs().max() > 1e-3 for name in expected)

    def test_the_loss_is_the_mean_over_all_valid_rows(self) -> None:
        step = regression_step()
        batches = random_batches(step, 1, 3)
        whole = joined(batches)
        with torch.no_grad():
            error_N2 = (step.model(whole["x"]) - whole["y"]).double().numpy()
        valid_N = whole["valid"].numpy()
        outcome = step(0, batches)
        assert outcome.loss == pytest.approx(np.square(error_N2).mean(1)[valid_N].mean(), rel=1e-6)
        assert outcome.weight == valid_N.sum()

    def test_micro_batches_that_count_nothing_add_nothing(self) -> None:
        workload = masked_regression(torch.float64)
        safe = replace(workload, loss=lambda m, b: workload.loss(m, b) if b["valid"].any() else m(b["x"]).sum())
        step = regression_step(safe)
        full, empty = random_batches(step, 0, 2)
        empty["valid"][:] = False
        step.accumulate([full], [int(full["valid"].sum())])
        expected = gradients(step.model)
        step.optimizers.zero_grad()
        step.accumulate([full, empty], [int(full["valid"].sum()), 0])
        for name, value in gradients(step.model).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)

    def test_a_step_of_nothing_but_empty_micro_batches_moves_nothing(self) -> None:
        step = regression_step(replace(masked_regression(), weight=lambda batch: 0))
        before = copies(step.model.state_dict())
        outcome = step(0, random_batches(step, 0, 2))
        assert (outcome.loss, outcome.grad_norm, outcome.weight) == (0.0, 0.0, 0)
        assert same_bits(step.model.state_dict(), before)

    def test_a_weight_may_be_a_tensor(self) -> None:
        step = regression_step(replace(masked_regression(), weight=lambda batch: batch["valid"].sum()))
        batches = random_batches(step, 1, 2)
        outcome = step(0, batches)
        assert type(outcome.weight) is int
        assert outcome.weight == sum(int(batch["valid"].sum()) for batch in batches)


class TestClipping:
    @pytest.mark.parametrize("clip_norm", [1e-3, 0.1])
    def test_a_long_gradient_is_scaled_to_the_norm(self, clip_norm: float) -> None:
        seen = AtOptimizer()
        step = regression_step(None, seen, clip_norm=clip_norm)
        seen.model = step.model
        batches = random_batches(step, 0, 1)
        step.accumulate(batches, [1])
        full = gradients(step.model)
        step.optimizers.zero_grad()
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in full.values()))
        assert norm > clip_norm

        outcome = step(0, batches)
        assert outcome.grad_norm == pytest.approx(norm, rel=1e-6)  # as it was before
        for name, used in seen.gradients.items():
            torch.testing.assert_close(
                used, full[name] * (clip_norm / norm), rtol=2e-3 * 1e-6 / clip_norm + 1e-5, atol=0
            )
        used_norm = math.sqrt(sum(float(g.double().square().sum()) for g in seen.gradients.values()))
        assert used_norm == pytest.approx(clip_norm, rel=2e-6 / norm + 1e-6)

    @pytest.mark.parametrize("clip_norm", [0.0, 1e6])
    def test_a_short_one_and_an_unclipped_one_stay_as_they_are(self, clip_norm: float) -> None:
        step = regression_step(clip_norm=clip_norm)
        before = copies(step.model.state_dict())
        batches = random_batches(step, 0, 1)
        step.accumulate(batches, [1])
        gradient = gradients(step.model)
        step.optimizers.zero_grad()
        step(0, batches)
        moved = {name: before[name] - gradient[name] for name in gradient}
        assert same_bits(step.model.state_dict(), moved)


class Overflow(torch.autograd.Function):
    """Passes its input on; its gradient overflows beyond a limit, as float16's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.where(gradient.abs() > ctx.limit, torch.inf, gradient), None


def overflowing(limit: float) -> Workload:
    """The loss's own gradient is the loss scale, which overflows beyond `limit`."""
    workload = masked_regression()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        result: Tensor = Overflow.apply(workload.loss(model, batch).float(), limit)  # type: ignore[no-untyped-call]
        return result

    return replace(workload, loss=loss)


class TestNonFinite:
    @pytest.mark.parametrize("optimizer", ["gradient-descent", "adamw"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_bad_loss_changes_nothing(self, optimizer: str, value: float) -> None:
        step = regression_step(optimizer__name=optimizer, clip_norm=1.0)
        run_steps(step, 2)
        weights, state = copies(step.model.state_dict()), copies(step.optimizers.state())
        bad = random_batches(step, 9)
        bad[0]["y"][0] = value
        outcome = step(2, bad)
        assert not math.isfinite(outcome.loss)
        assert (outcome.applied, outcome.finite) == (False, False)
        assert same_bits(step.model.state_dict(), weights)
        assert same_bits(step.optimizers.state(), state)
        assert gradients(step.model) == {}
        assert step(3, random_batches(step, 10)).applied

    def test_a_bad_gradient_of_a_good_loss_changes_nothing(self) -> None:
        step = regression_step(overflowing(limit=0.5), clip_norm=1.0)
        before = copies(step.model.state_dict())
        outcome = step(0, random_batches(step, 0))
        assert math.isfinite(outcome.loss)
        assert not math.isfinite(outcome.grad_norm)
        assert (outcome.applied, outcome.finite) == (False, False)
        assert same_bits(step.model.state_dict(), before)


class TestLossScaling:
    def test_an_overflow_halves_the_scale_and_costs_the_update_alone(self) -> None:
        step = regression_step(overflowing(limit=2.0**14), precision__mode="fp16-mixed")
        scale = step.precision.loss_scale
        assert scale is not None
        seen = []
        for number in range(4):
            before = copies(step.model.state_dict())
            outcome = step(number, random_batches(step, number))
            moved = not same_bits(step.model.state_dict(), before)
            assert outcome.finite  # only its scaling made the gradient infinite
            assert moved == outcome.applied
            seen.append((outcome.applied, scale.value))
        assert seen == [(False, 2.0**15), (False, 2.0**14), (True, 2.0**14), (True, 2.0**14)]

    def test_good_steps_double_the_scale(self) -> None:
        step = regression_step(precision__mode="fp16-mixed")
        scale = step.precision.loss_scale
        assert scale is not None
        scale.value, scale.growth_interval = 4.0, 3
        run_steps(step, 7)
        assert (scale.value, scale.good_steps) == (16.0, 1)

    def test_a_gradient_that_no_scale_saves_is_not_finite(self) -> None:
        step = regression_step(overflowing(limit=0.0), precision__mode="fp16-mixed")
        before = copies(step.model.state_dict())
        outcomes = [step(number, random_batches(step, number)) for number in range(18)]
        assert [outcome.finite for outcome in outcomes] == [True] * 16 + [False] * 2  # 2^16 down to 1, then below
        assert same_bits(step.model.state_dict(), before)

    def test_an_infinite_loss_says_nothing_about_the_scale(self) -> None:
        step = regression_step(precision__mode="fp16-mixed")
        bad = random_batches(step, 0)
        bad[0]["y"][0] = math.inf
        assert not step(0, bad).finite
        assert step.precision.loss_scale is not None
        assert step.precision.loss_scale.value == 2.0**16

    @pytest.mark.parametrize("clip_norm", [0.0, 0.05])
    def test_the_update_does_not_depend_on_the_scale(self, clip_norm: float) -> None:
        """A power of two scales without rounding, so the update is the same to the bit, clipped or not."""
        updates, norms = [], []
        for value in (1.0, 2.0**10):
            step = regression_step(clip_norm=clip_norm, precision__mode="fp16-mixed")
            assert step.precision.loss_scale is not None
            step.precision.loss_scale.value = value
            # In float32, where nothing is lost by small gradients of the unscaled step.
            step.precision.mode = "fp32"
            norms.append(step(0, random_batches(step, 0, 2)).grad_norm)
            updates.append(copies(step.model.state_dict()))
        assert norms[0] == norms[1]
        for name in updates[0]:
            torch.testing.assert_close(updates[0][name], updates[1][name], rtol=1e-6, atol=1e-8)


class TestPhases:
    def test_their_order(self) -> None:
        recorder = Recorder()
        run_steps(regression_step(None, recorder), 1, micro_batches=2)
        once = "+forward -forward +backward -backward "
        expected = f"+step +data -data {once * 2}+clip -clip +optimizer -optimizer -step"
        assert recorder.events == expected.split(" ")

    def test_no_update_no_optimizer(self) -> None:
        recorder = Recorder()
        step = regression_step(overflowing(limit=0.5), recorder)
        run_steps(step, 1)
        assert "+clip" in recorder.events
        assert "+optimizer" not in recorder.events

    def test_recomputation_lies_inside_the_backward_once_a_block(self) -> None:
        recorder = Recorder()
        step = transformer_step(small_config({"model.n_layers": 3, "activation_checkpoint.policy": "full"}), recorder)
        run_steps(step, 1, micro_batches=2)
        once = "+forward -forward +backward" + " +recompute -recompute" * 3 + " -backward "
        expected = f"+step +data -data {once * 2}+clip -clip +optimizer -optimizer -step"
        assert recorder.events == expected.split(" ")

    def test_evaluation_recomputes_nothing(self) -> None:
        recorder = Recorder()
        step = transformer_step(small_config({"activation_checkpoint.policy": "full"}), recorder)
        evaluate(step.model, step.workload, step.precision, random_batches(step, 0))
        assert recorder.events == []

    def test_a_phase_ends_though_the_step_fails(self) -> None:
        recorder = Recorder()
        step = regression_step(replace(masked_regression(), loss=lambda model, batch: batch["no such key"]), recorder)
        with pytest.raises(KeyError):
            run_steps(step, 1)
        assert recorder.events == ["+step", "+data", "-data", "+forward", "-forward", "-step"]

    def test_the_first_instrument_is_outermost_and_nothing_begins_before_it_is_entered(self) -> None:
        log: list[str] = []

        class Named(Recorder):
            def __init__(self, name: str) -> None:
                self.events = log
                self.name = name

            def phase(self, name: Any) -> Any:
                return self._record(f"{self.name}:{name}")  # type: ignore[arg-type]

        phase = Announcer([Named("a"), Named("b")]).phase("clip")
        assert log == []
        with phase:
            pass
        assert log == ["+a:clip", "+b:clip", "-b:clip", "-a:clip"]


def test_the_learning_rate_is_the_schedules() -> None:
    """With gradient descent the update is lr times the gradient, so a rate twice as high moves twice as far."""
    step = regression_step(schedule__warmup_steps=4)
    before, batches = copies(step.model.state_dict()), random_batches(step, 0)
    step.accumulate(batches, [1])
    gradient = gradients(step.model)
    step.optimizers.zero_grad()
    outcome = step(1, batches)  # the second of four warm-up steps to 1
    assert outcome.lr == 0.5
    assert same_bits(step.model.state_dict(), {name: before[name] - 0.5 * gradient[name] for name in gradient})


def test_a_step_trains_in_training_mode() -> None:
    modes = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        modes.append(model.training)
        result: Tensor = model(batch["x"]).square().mean()
        return result

    step = regression_step(replace(masked_regression(), loss=loss, model=Perceptron))
    step.model.eval()
    run_steps(step, 1)
    assert modes == [True]
