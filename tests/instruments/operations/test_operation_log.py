from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bptool.instruments.operations.log import Operation, OperationLog, Shape


def test_a_products_flops_and_traffic() -> None:
    """[8, 64] x [64, 32] is 2 x 8 x 64 x 32 FLOPs, and moves 4 bytes of each of 512 + 2048 + 256 numbers."""
    left, right, log = torch.ones(8, 64), torch.ones(64, 32), OperationLog()
    with log:
        left @ right
    (product,) = log.by_phase[""]
    assert (product.flops, product.traffic_bytes) == (2 * 8 * 64 * 32, 4 * (512 + 2048 + 256))
    assert product.result_bytes == 4 * 256
    assert product.call == (
        (Shape((8, 64), (64, 1), torch.float32, False), Shape((64, 32), (32, 1), torch.float32, False)),
        {},
    )


def test_phases_are_kept_apart_and_views_are_free() -> None:
    log, x = OperationLog(), torch.ones(10)
    with log, log.phase("backward"):
        x.exp()
        with log.phase("recompute"):
            x.view(2, 5).t().detach()
            x + x
    assert {phase: sum(one.traffic_bytes for one in found) for phase, found in log.by_phase.items()} == {
        "backward": 4 * 20,
        "recompute": 4 * 30,
    }


def test_a_cpus_attention_has_its_products() -> None:
    """Two of B H T T Q multiply-adds, which PyTorch's own counter leaves out."""
    q, log = torch.ones(2, 3, 16, 8), OperationLog()
    with log, torch.no_grad():
        F.scaled_dot_product_attention(q, q, q)
    assert sum(one.flops for one in log.by_phase[""]) == pytest.approx(4 * 2 * 3 * 16 * 16 * 8)


def test_what_is_written_into_later_is_told() -> None:
    """Through a view as well; a later result in the same memory is another one."""
    log, x = OperationLog(), torch.ones(4)

    def named(name: str) -> list[Operation]:
        return [one for one in log.by_phase[""] if one.func.overloadpacket.__name__ == name]

    with log:
        doubled = x * 2
        doubled.view(2, 2).add_(1)
        x.exp()
        for _ in range(3):
            x.sin()
    assert [one.overwritten for one in named("mul")] == [True]
    assert [one.overwritten for one in [*named("exp"), *named("sin")]] == [False] * 4
