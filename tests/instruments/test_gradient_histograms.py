from __future__ import annotations

import math

import pytest
import torch
from small_runs import CPU, masked_regression, random_batches, run_steps, small_config
from torch import Tensor

from bptool.instruments.gradient_histograms import GradientHistograms
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.step import TrainStep

NAMES = ["first.weight", "first.bias", "second.weight", "second.bias"]


def watched(every: int, first_step: int = 0) -> tuple[TrainStep, list[tuple[str, int, Tensor]]]:
    seen: list[tuple[str, int, Tensor]] = []
    step = build_step(small_config({"training.clip_norm": 0.01}), masked_regression(), CPU, Announcer())
    histograms = GradientHistograms(
        step.model,
        every=every,
        first_step=first_step,
        write=lambda name, gradient, number: seen.append((name, number, gradient.clone())),
    )
    step.announcer.instruments.append(histograms)
    return step, seen


@pytest.mark.parametrize(("every", "first_step", "steps"), [(1, 0, [1, 2, 3, 4, 5]), (2, 0, [2, 4]), (3, 7, [9, 12])])
def test_every_so_many_steps_of_the_run(every: int, first_step: int, steps: list[int]) -> None:
    step, seen = watched(every, first_step)
    run_steps(step, 5)
    assert [(name, number) for name, number, _ in seen] == [(name, number) for number in steps for name in NAMES]


def test_as_the_optimizer_uses_them() -> None:
    step, seen = watched(1)
    run_steps(step, 1)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for _, _, gradient in seen))
    assert norm == pytest.approx(0.01, rel=1e-3)  # clipped


def test_a_step_without_an_update_has_none_and_is_counted() -> None:
    step, seen = watched(1)
    bad = random_batches(step, 0)
    bad[0]["y"][0] = torch.nan
    for number, batches in enumerate((bad, random_batches(step, 1))):
        with step.announcer.phase("step"):
            step(number, batches)
    assert {number for _, number, _ in seen} == {2}
