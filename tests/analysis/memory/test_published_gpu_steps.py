"""Predicted memory of a GPU that is not here, beside what others measured on one; see `published_cuda_steps`."""

from __future__ import annotations

from typing import Any

import pytest
from published_cuda_steps import STEPS, predicted_step


@pytest.mark.slow
@pytest.mark.parametrize("row", STEPS["peaks"], ids=lambda row: f"{row['model']}-{row['batch']}x{row['size']}")
def test_allocated_within_one_percent_and_reserved_within_three(row: dict[str, Any]) -> None:
    step = predicted_step(row["model"], row["batch"], row["size"])
    assert step.peak_bytes == pytest.approx(row["allocated"], rel=0.01)
    assert step.reserved_bytes == pytest.approx(row["reserved"], rel=0.03)
