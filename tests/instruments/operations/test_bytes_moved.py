"""Bytes that single operations move, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bptool.instruments.operations.recorder import OperationRecorder

X, Y = torch.randn(4, 6), torch.randn(6, 3)
BYTES = 4 * 4 * 6
"""Of X."""
TABLE = torch.randn(100, 6)
INDEX = torch.tensor([3, 3, 4, 5])
CUT = torch.randn(4, 12).chunk(2, dim=1)


def moved(run: Callable[[], Any]) -> int:
    with OperationRecorder() as recorder:
        run()
    return sum(operation.bytes_moved for operation in recorder.trace().operations)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X @ Y, BYTES + 4 * 6 * 3 + 4 * 4 * 3),
        (lambda: X + X, 2 * BYTES),  # read once
        (lambda: X * 2, 2 * BYTES),
        (lambda: X.add_(X.new_zeros(())), 2 * BYTES + 8),  # the zero is written, then read
        (lambda: X.neg_().neg_(), 4 * BYTES),
        (lambda: torch.add(X, X, out=X), 2 * BYTES),
        (lambda: X.t()[:, 1:].unsqueeze(0), 0),
        (lambda: X.reshape(6, 4).view(24), 0),
        (lambda: torch.empty(1000), 0),
        (lambda: torch.empty_like(X), 0),
        (lambda: torch.zeros(10), 40),
        (lambda: X.new_empty(5).fill_(1), 20),
        (lambda: X.new_empty(4, 6).copy_(X), 2 * BYTES),
        (lambda: X.new_ones(1).expand(1000) + 0, 2 * 4 + 4000),  # one number is written, and read for all
        (lambda: CUT[0] + CUT[1], 3 * BYTES),  # two halves of one storage
        (lambda: X.double(), 3 * BYTES),
        (lambda: F.embedding(INDEX, TABLE), 2 * BYTES + 32),
        (lambda: TABLE[INDEX], 2 * BYTES + 32),
        (lambda: TABLE.index_add_(0, INDEX, X), 3 * BYTES + 32),  # the source, and the rows that it is added to
        (lambda: torch._foreach_add_([X, X.clone()], 0.0), 2 * BYTES + 4 * BYTES),
    ],
)
def test_by_hand(run: Callable[[], Any], expected: int) -> None:
    assert moved(run) == expected


def test_a_fused_update_reads_four_tensors_and_writes_three() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    parameter.grad = torch.randn(4, 6)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    counters = 4 + 2 * 4  # the counter of steps is read by the update; one is added to it before
    assert moved(optimizer.step) == (4 + 3) * BYTES + counters
