"""Against gradients by hand: a closed form, and plain autograd on a model that is built here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import CPU, question_of, small_config
from torch import Tensor, nn

from bptool.analysis.compare.gradient_error import Distance, by_layer, gradient_error, overall, split, write_reference
from bptool.analysis.compare.job import Outcome
from bptool.analysis.compare.same_start import data_of
from bptool.analysis.memory.fit import predict_peak
from bptool.analysis.question import Question
from bptool.config.target import CodeTarget
from bptool.training.assembly import build_model
from bptool.training.seeds import derive_seed
from bptool.training.workload import Workload

X = torch.linspace(-1, 2, 24).reshape(8, 3).sin()
Y = torch.linspace(0, 1, 8)
WEIGHT = torch.tensor([[0.3, -1.1, 0.7]])


def regression(dtype: torch.dtype | None = None) -> Workload:
    """`mean((x w - y)^2)` from given weights."""

    def model() -> nn.Module:
        linear = nn.Linear(3, 1, bias=False, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(WEIGHT)
        return nn.Sequential(nn.Dropout(0.5), linear)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x_N3, y_N = batch
        error_N: Tensor = model(x_N3.to(model[1].weight.dtype))[:, 0] - y_N  # type: ignore[index]
        return error_N.square().mean()

    return Workload(model, lambda generator: (X, Y), loss, blocks=lambda model: [])


def own(workload: Workload, changes: Mapping[str, object] | None = None) -> Question:
    return replace(question_of(small_config(changes), workload), code=CodeTarget("regression", "here"))


def by_hand() -> np.ndarray[Any, np.dtype[np.float64]]:
    """2/N X^T (X w - y), in float64."""
    x, y, w = X.double().numpy(), Y.double().numpy(), WEIGHT.double().numpy()
    gradient: np.ndarray[Any, np.dtype[np.float64]] = 2 / len(y) * (x @ w[0] - y) @ x
    return gradient


def reference_of(question: Question, folder: Path, sequences: int = 2) -> tuple[dict[str, Tensor], Outcome]:
    file = folder / "reference.safetensors"
    outcome = write_reference(question, folder, file, sequences=sequences)
    return load_file(file), outcome


def error_of(question: Question, folder: Path, sequences: int = 2) -> dict[str, Any]:
    return gradient_error(question, folder, folder / "reference.safetensors", sequences=sequences).figures


def test_the_reference_is_the_closed_form(tmp_path: Path) -> None:
    gradient, outcome = reference_of(own(regression()), tmp_path)
    assert outcome.figures == {"reference": "float64"}
    assert outcome.notes == []
    np.testing.assert_allclose(gradient["1.weight"].numpy()[0], by_hand(), rtol=1e-13)


@pytest.mark.parametrize(("mode", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_error_is_the_distance_from_it(mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference_of(own(regression()), tmp_path)
    figures = error_of(own(regression(), {"precision.mode": mode}), tmp_path)
    weight = WEIGHT.clone().to(dtype).requires_grad_()
    ((X.to(dtype) @ weight[0]) - Y).square().mean().backward()
    assert weight.grad is not None
    expected = np.linalg.norm(weight.grad.double().numpy()[0] - by_hand()) / np.linalg.norm(by_hand())
    assert figures["relative_error"] == pytest.approx(expected, rel=1e-6)
    assert figures["layers"] == {"1": pytest.approx(expected, rel=1e-6)}


def test_a_model_that_refuses_float64_is_compared_in_float32(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        error_N: Tensor = model(batch[0].float())[:, 0] - batch[1].float()
        return error_N.square().mean()

    gradient, outcome = reference_of(own(replace(regression(), loss=loss)), tmp_path)
    assert outcome.figures == {"reference": "float32"}
    assert gradient["1.weight"].dtype == torch.float32
    assert "float64" in outcome.notes[0]


@pytest.mark.parametrize(("share", "dtype"), [(2.0, "float64"), (1.9, "float32"), (1.0, "float32"), (0.9, None)])
def test_so_is_one_that_has_no_room_for_it(share: float, dtype: str | None, tmp_path: Path) -> None:
    """As a share of what float32 needs that recomputes; an optimizer without state has no part in it."""
    frugal = {"activation_checkpoint.policy": "full", "optimizer.name": "gradient-descent"}
    capacity = int(share * predict_peak(question_of(small_config(frugal))).peak_bytes)
    question = question_of(small_config())
    question = replace(question, machine=replace(question.machine, capacity_bytes=capacity))
    outcome = write_reference(question, tmp_path, tmp_path / "reference.safetensors", sequences=2)
    assert outcome.figures == {"reference": dtype}
    assert (tmp_path / "reference.safetensors").exists() == (dtype is not None)
    if dtype != "float64":
        assert "needs" in outcome.notes[0]


def test_the_transformers_reference_is_autograds(tmp_path: Path) -> None:
    """Built here in float64, from the weights that the run's seed gives in float32; dropout is off."""
    question = question_of(small_config({"model.dropout": 0.3}))
    gradient, _ = reference_of(question, tmp_path, sequences=4)
    plain = question_of(small_config({"training.micro_batch_size": 4}))
    torch.manual_seed(derive_seed(plain.config.run.seed, "weights"))
    weights = build_model(plain.workload, CPU, torch.float32).state_dict()
    model = build_model(plain.workload, CPU, torch.float64)
    model.load_state_dict(weights)
    batch = data_of(plain, CPU, tmp_path)[0].micro_batches(0)[0]
    assert len(batch["tokens"]) == 4
    plain.workload.loss(model, batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-10, atol=1e-14)


EXACT: list[dict[str, Any]] = [
    {},
    {"model.dropout": 0.4},
    {"training.micro_batch_size": 1},
    {"training.micro_batch_size": 3},
    {"training.micro_batch_size": 9, "training.gradient_accumulation_steps": 2},
    {"model.attention": "eager", "training.loss": "plain"},
    {"activation_checkpoint.policy": "full"},
    {"activation_checkpoint.policy": "budget", "activation_checkpoint.budget": "1MiB"},
    {"optimizer.name": "sgd"},
]


@pytest.mark.parametrize("changes", EXACT, ids=str)
def test_rows_in_float32_are_near_whatever_they_change(changes: dict[str, Any], tmp_path: Path) -> None:
    """Other micro-batches are of the same samples, other weights or dropout would be far away."""
    reference_of(question_of(small_config()), tmp_path, sequences=4)
    error = error_of(question_of(small_config(changes)), tmp_path, sequences=4)["relative_error"]
    assert 0 < error < 2e-6


@pytest.mark.parametrize("mode", ["bf16-mixed", "bf16", "fp16-mixed"])
def test_narrow_formats_are_as_far_as_their_rounding(mode: str, tmp_path: Path) -> None:
    """Half a unit in the last place is 2^-9 in bf16 and 2^-12 in fp16; errors add up over some operations."""
    reference_of(question_of(small_config()), tmp_path)
    figures = error_of(question_of(small_config({"precision.mode": mode})), tmp_path)
    unit = 2.0**-12 if mode == "fp16-mixed" else 2.0**-9
    assert unit / 4 < figures["relative_error"] < 20 * unit


def test_another_seed_is_another_gradient(tmp_path: Path) -> None:
    """The test above could not fail otherwise."""
    reference_of(question_of(small_config()), tmp_path)
    assert error_of(question_of(small_config({"run.seed": 5})), tmp_path)["relative_error"] > 0.5


def test_layers_by_hand() -> None:
    distances = [
        Distance("a.weight", error=9.0, norm=100.0, count=6),
        Distance("a.bias", error=7.0, norm=300.0, count=2),
        Distance("b.weight", error=4.0, norm=0.0, count=2),
        Distance("scale", error=0.0, norm=0.0, count=10),
    ]
    assert overall(distances) == math.sqrt(20 / 400)
    layers = by_layer(distances)
    assert layers["a"] == math.sqrt(16 / 400)
    # A thousandth of the norm that 2 of 20 elements have of a gradient of norm 20.
    assert layers["b"] == pytest.approx(2 / (1e-3 * 20 * math.sqrt(2 / 20)))
    assert layers["model"] == 0.0


@pytest.mark.parametrize(("size", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_a_batch_is_split_without_loss(size: int, sizes: Sequence[int]) -> None:
    batch = {"tokens": torch.arange(10).reshape(5, 2), "targets": torch.arange(5)}
    parts = split(batch, size)
    assert [len(part["tokens"]) for part in parts] == sizes
    assert all(torch.equal(torch.cat([part[key] for part in parts]), batch[key]) for key in batch)
