"""Each format's gradient beside float64's: where the rounding is known by hand, and on the transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import masked_regression, small_config
from torch import Tensor, nn

from bptool.analysis.gradcheck.precision import PrecisionCheck, check_precision
from bptool.errors import DeviceError
from bptool.training.workload import Workload, transformer_workload

MODES = ["fp32", "bf16-mixed", "bf16", "fp16-mixed"]
UNIT = {"fp32": 2.0**-24, "bf16-mixed": 2.0**-8, "bf16": 2.0**-8, "fp16-mixed": 2.0**-11}
"""Half the distance of 1 to the next number."""


def of_transformer(mode: str, changes: dict[str, object] | None = None) -> PrecisionCheck:
    config = small_config(changes)
    return check_precision(config, transformer_workload(config), mode, built_in=True, seed=2)


class Scaled(nn.Module):
    """A linear layer without bias; row n of its output counts `slopes[n]` in the loss, so dW = slope^T x."""

    def __init__(self, slopes: list[float]) -> None:
        super().__init__()
        self.slopes = slopes
        self.layer = nn.Linear(4, len(slopes), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        wide = torch.promote_types(y.dtype, torch.float32)
        total: Tensor = (y.to(wide) * torch.tensor(self.slopes, dtype=wide)).sum()
        return total


def one_row(slopes: list[float], x: list[float]) -> Workload:
    return Workload(
        model=lambda: Scaled(slopes), batch=lambda generator: torch.tensor([x]), loss=lambda model, batch: model(batch)
    )


X = [0.1, 0.7, -3.3, 1 / 3]


def rounded(x: list[float], dtype: torch.dtype) -> tuple[float, float]:
    """Relative error and cosine of what rounding makes of `x` (float32 itself is exact here)."""
    exact = torch.tensor(x).double()
    found = torch.tensor(x).to(dtype).double()
    return float((found - exact).norm() / exact.norm()), float(F.cosine_similarity(found, exact, dim=0))


@pytest.mark.parametrize(("mode", "dtype"), [("bf16-mixed", torch.bfloat16), ("fp16-mixed", torch.float16)])
def test_a_product_whose_rounding_is_known(mode: str, dtype: torch.dtype) -> None:
    """dW = 1 * x, and autocast rounds x once."""
    (found,) = check_precision(small_config(), one_row([1.0], X), mode, built_in=False, seed=0).tensors
    error, cosine = rounded(X, dtype)
    assert error > 0
    assert found.relative_error == pytest.approx(error, rel=1e-12)
    assert found.cosine == pytest.approx(cosine, rel=1e-12)
    assert found.gradient_norm == pytest.approx(float(torch.tensor(X).double().norm()), rel=1e-12)
    assert (found.underflow_share, found.nonfinite_share) == (0, 0)


def test_float32_adds_nothing_to_a_product_by_one() -> None:
    found = check_precision(small_config(), one_row([1.0], X), "fp32", built_in=False, seed=0)
    assert found.whole.relative_error == 0
    assert (found.loss_scale, found.whole_without_scaling) == (None, None)


def test_a_slope_that_underflows_without_loss_scaling() -> None:
    """2^-30 is below half of float16's smallest number, 2^-24; times 2^16 it is a normal one. Half the rows have it."""
    workload = one_row([2.0**-4, 2.0**-30], X)
    check = check_precision(small_config(), workload, "fp16-mixed", built_in=False, seed=0)
    (found,) = check.tensors
    assert check.loss_scale == 2.0**16
    assert found.underflow_share == 0
    assert found.without_scaling is not None
    assert found.without_scaling.underflow_share == 0.5
    assert "none of it underflows to 0 (50.00% without loss scaling)" in check.detail
    # bfloat16 has float32's range.
    assert check_precision(small_config(), workload, "bf16-mixed", built_in=False, seed=0).whole.underflow_share == 0


def test_a_scale_that_overflows_is_halved_as_in_training() -> None:
    """30001 * 2^16 is far beyond float16's 65504; 30001 * 2 is within, and rounded to the next multiple of 32."""
    check = check_precision(
        small_config(), one_row([30001.0], [1.0, 1.0, 0.5, 1.0]), "fp16-mixed", built_in=False, seed=0
    )
    assert check.loss_scale == 2
    assert check.whole.nonfinite_share == 0
    assert check.whole.relative_error == pytest.approx(1 / 30001, rel=1e-9)


def test_a_gradient_that_no_scale_saves_is_said() -> None:
    check = check_precision(small_config(), one_row([1e6, 1.0], X), "fp16-mixed", built_in=False, seed=0)
    assert check.whole.nonfinite_share == 0.5
    assert "50.00% of it is NaN or infinite" in check.detail
    document = check.model_dump_json()
    assert '"nonfinite_share":0.5' in document


def test_tf32_on_a_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(DeviceError, match="tf32' needs a CUDA device"):
        of_transformer("tf32")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"model.dropout": 0.3}, {"model.dropout": 0.3, "model.attention": "eager"}, {"model.mla.kv_rank": 8}],
    ids=["plain", "dropout", "dropout in eager attention", "latent"],
)
def test_the_transformers_error_is_of_the_formats_size(mode: str, changes: dict[str, Any]) -> None:
    """With dropout too, so its masks are the same in every format: another mask is off by more than the gradient."""
    check = of_transformer(mode, changes)
    assert check.whole.relative_error is not None
    assert check.whole.cosine is not None
    assert 0.1 * UNIT[mode] < check.whole.relative_error < 20 * UNIT[mode]
    assert 1 - 400 * UNIT[mode] ** 2 < check.whole.cosine <= 1 + 1e-12
    assert check.loss == pytest.approx(check.loss_float64, rel=4 * UNIT[mode])


@pytest.mark.parametrize("mode", MODES)
def test_those_that_lose_most_come_first(mode: str) -> None:
    check = of_transformer(mode)
    errors = [record.relative_error or 0.0 for record in check.tensors]
    assert errors == sorted(errors, reverse=True)
    assert check.tensors[0].name in check.detail
    config = small_config()
    names = {name for name, _ in transformer_workload(config).model().named_parameters()}
    assert {record.name for record in check.tensors} == names


def test_what_is_zero_by_structure_comes_last() -> None:
    """A key bias moves all of a query's scores alike where nothing is rotated, and softmax takes no notice."""
    changes = {"model.bias": True, "model.norm": "layernorm", "model.position": "learned"}
    check = of_transformer("bf16-mixed", changes)
    zero = [record.name for record in check.tensors if record.structurally_zero]
    assert sorted(zero) == ["blocks.0.attention.key.bias", "blocks.1.attention.key.bias"]
    assert [record.name for record in check.tensors[-2:]] == zero


def test_the_weights_of_bf16_are_the_references_too() -> None:
    """Rounded weights have another loss; the reference's must be theirs."""
    wide, narrow = of_transformer("fp32", {"model.init_std": 0.5}), of_transformer("bf16", {"model.init_std": 0.5})
    assert wide.loss_float64 != narrow.loss_float64
    assert narrow.loss == pytest.approx(narrow.loss_float64, rel=0.05)


def test_a_users_workload() -> None:
    check = check_precision(small_config(), masked_regression(), "bf16-mixed", built_in=False, seed=1)
    assert {record.name for record in check.tensors} == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert check.whole.relative_error is not None
    assert 1e-4 < check.whole.relative_error < 0.05
