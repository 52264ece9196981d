"""What the loss of 50,257 tokens adds to the memory, from the allocator's own events."""

from __future__ import annotations

import pytest
import torch

from bptool.instruments.memory.peak import PeakMemory
from bptool.model.loss import linear_cross_entropy, plain_cross_entropy
from bptool.units import format_bytes

pytestmark = pytest.mark.benchmark


def _peak_bytes(loss: str, n_tokens: int, dtype: torch.dtype) -> int:
    x_ND = torch.randn(n_tokens, 768, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(50257, 768, dtype=dtype, requires_grad=True)
    targets_N = torch.randint(50257, (n_tokens,))
    function = {"plain": plain_cross_entropy, "fused": linear_cross_entropy}[loss]
    peak = PeakMemory(torch.device("cpu"), lambda: [], measured_step=0)
    with peak.phase("step"):
        function(x_ND, weight_VD, targets_N).backward()
    assert peak.peak_bytes is not None
    return peak.peak_bytes - 4 * (x_ND.numel() + weight_VD.numel()) * dtype.itemsize // 4  # the gradients themselves


def test_loss_memory() -> None:
    """Beyond the gradients that any loss must make: plain holds logits and more, fused one chunk of them."""
    print("\nloss of 768-wide tokens, vocabulary 50,257: peak beyond the gradients")
    print(f"  {'tokens':>8}{'dtype':>10}{'one set of logits':>20}{'plain':>14}{'fused':>14}")
    for n_tokens in (512, 2048):
        for dtype in (torch.float32, torch.bfloat16):
            logits = n_tokens * 50257 * dtype.itemsize
            row = [format_bytes(_peak_bytes(loss, n_tokens, dtype)) for loss in ("plain", "fused")]
            name = str(dtype).removeprefix("torch.")
            print(f"  {n_tokens:>8}{name:>10}{format_bytes(logits):>20}{row[0]:>14}{row[1]:>14}")
