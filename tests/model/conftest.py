from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random tensors are the same in every run of a test."""
    torch.manual_seed(0)
