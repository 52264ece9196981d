from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import masked_regression, random_batches, small_config, transformer_step
from torch import Tensor, nn

from bptool.config.schema import PrecisionSettings
from bptool.training.evaluation import evaluate
from bptool.training.precision import Precision
from bptool.training.workload import Batch

CPU = torch.device("cpu")
FP32 = Precision(PrecisionSettings(mode="fp32"), CPU)


def batches(count: int) -> list[Batch]:
    workload = masked_regression()
    return [workload.batch(torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_the_mean_over_all_that_counts() -> None:
    """Against numpy in float64: batches with more valid rows weigh more."""
    workload, held_out = masked_regression(), batches(4)
    torch.manual_seed(0)
    model = workload.model()
    w1, b1, w2, b2 = (parameter.detach().double().numpy() for parameter in model.parameters())
    losses, means = [], []
    for batch in held_out:
        x, y, valid = (batch[key].numpy().astype(float) for key in ("x", "y", "valid"))
        rows = np.square(np.tanh(x @ w1.T + b1) @ w2.T + b2 - y).mean(1)[valid.astype(bool)]
        losses += rows.tolist()
        means.append(rows.mean())
    assert evaluate(model, workload, FP32, held_out) == pytest.approx(np.mean(losses), rel=1e-6)
    assert abs(np.mean(means) - np.mean(losses)) > 1e-4  # the mean of the batches' means is another number


@pytest.mark.parametrize("training", [True, False])
def test_without_dropout_and_the_mode_is_put_back(training: bool) -> None:
    step = transformer_step(small_config({"model.dropout": 0.5}))
    step.model.train(training)
    held_out = random_batches(step, 0, 2)
    first = evaluate(step.model, step.workload, step.precision, held_out)
    assert evaluate(step.model, step.workload, step.precision, held_out) == first
    assert step.model.training is training


def test_the_mode_is_put_back_after_an_error_too() -> None:
    workload = masked_regression()
    model = workload.model().train()
    with pytest.raises(KeyError):
        evaluate(model, replace(workload, loss=lambda model, batch: batch["no such key"]), FP32, batches(1))
    assert model.training


def test_no_gradient_is_recorded() -> None:
    """A hook on what autograd saves for a backward sees nothing."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    workload = masked_regression()
    model = workload.model()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        evaluate(model, workload, FP32, batches(2))
        assert saved == []
        workload.loss(model, batches(1)[0])
        assert saved
    assert [parameter.grad for parameter in model.parameters()] == [None] * 4


def test_it_computes_as_training_does() -> None:
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch["x"])
        seen.append(output.dtype)
        result: Tensor = output.float().square().mean()
        return result

    workload = replace(masked_regression(), loss=loss)
    evaluate(workload.model(), workload, Precision(PrecisionSettings(mode="bf16-mixed"), CPU), batches(1))
    assert seen == [torch.bfloat16]


def test_a_weight_may_be_a_tensor() -> None:
    workload, held_out = masked_regression(), batches(3)
    model = workload.model()
    as_tensor = replace(workload, weight=lambda batch: batch["valid"].sum())
    assert evaluate(model, as_tensor, FP32, held_out) == evaluate(model, workload, FP32, held_out)


def test_nothing_to_evaluate_on() -> None:
    workload = masked_regression()
    assert evaluate(workload.model(), workload, FP32, []) == 0.0
