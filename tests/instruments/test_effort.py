from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bptool.instruments.effort import Effort


def test_a_product_is_its_flops_or_its_traffic_whichever_is_more() -> None:
    """[8, 64] x [64, 32] is 2 x 8 x 64 x 32 FLOPs, and moves 4 bytes of each of 512 + 2048 + 256 numbers."""
    left, right = torch.ones(8, 64), torch.ones(64, 32)
    for flops_per_byte, expected in ((1.0, 2 * 8 * 64 * 32), (100.0, 100 * 4 * (512 + 2048 + 256))):
        effort = Effort(flops_per_byte)
        with effort:
            left @ right
        assert effort.by_phase == {"": expected}


def test_phases_are_kept_apart_and_views_are_free() -> None:
    effort = Effort(1.0)
    x = torch.ones(10)
    with effort, effort.phase("backward"):
        x.exp()
        with effort.phase("recompute"):
            x.view(2, 5).t().detach()
            x + x
    assert effort.by_phase == {"backward": 4 * 20, "recompute": 4 * 30}


def test_a_cpus_attention_has_its_products() -> None:
    """Two of B H T T Q multiply-adds, which PyTorch's own counter leaves out."""
    q = torch.ones(2, 3, 16, 8)
    effort = Effort(0.0)
    with effort, torch.no_grad():
        F.scaled_dot_product_attention(q, q, q)
    assert effort.by_phase[""] == pytest.approx(4 * 2 * 3 * 16 * 16 * 8)
