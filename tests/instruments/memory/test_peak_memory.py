from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bptool.instruments.memory.peak import PeakMemory, unique_storage_bytes
from bptool.training.instrument import Announcer

CPU = torch.device("cpu")
KIB = 1024


def kibibytes(count: int) -> Tensor:
    return torch.empty(count * KIB, dtype=torch.uint8)


def test_a_known_pattern() -> None:
    """100 are there; then 64 and 32 more, 64 go, 50 come: the most at once is 100 + 64 + 32."""
    held = kibibytes(100)
    memory = PeakMemory(CPU, lambda: [held], measured_step=0)
    with memory.phase("step"):
        first = kibibytes(64)
        second = kibibytes(32)
        del first
        third = kibibytes(50)
    assert memory.peak_bytes == (100 + 64 + 32) * KIB
    del second, third


@pytest.mark.parametrize("measured", [0, 1, 2])
def test_one_step_and_no_other_is_measured(measured: int) -> None:
    memory = PeakMemory(CPU, list, measured_step=measured)
    announcer = Announcer([memory])
    found = []
    for size in (10, 20, 30, 40):
        with announcer.phase("step"), announcer.phase("forward"):
            kibibytes(size)
        found.append(memory.peak_bytes)
    assert found == [None] * measured + [(10, 20, 30)[measured] * KIB] * (4 - measured)


def test_temporaries_inside_an_operation_are_seen() -> None:
    """The sum of two products holds both: 3 x 4 KiB beyond what is there."""
    x = torch.ones(KIB)
    memory = PeakMemory(CPU, lambda: [x], measured_step=0)
    with memory.phase("step"):
        y = x * 2.5 + x * 1.5
    assert memory.peak_bytes is not None
    assert 0 <= memory.peak_bytes - (4 + 3 * 4) * KIB <= 16  # and the two factors, 8 bytes each at most
    del y


def test_storages_are_counted_once() -> None:
    x = torch.zeros(10, dtype=torch.float64)
    assert unique_storage_bytes([x, x[2:5], x.view(5, 2), x.clone()]) == 160
    assert unique_storage_bytes([]) == 0
