"""That the record knows a causal attention, whose kernels do half of what all its scores would be."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from bptool.instruments.operations.flop_formulas import is_causal
from bptool.instruments.operations.recorder import OperationRecorder


@pytest.mark.parametrize("causal", [True, False])
def test_forward_and_backward_of_this_cpus_attention(causal: bool) -> None:
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    recorder = OperationRecorder(time.perf_counter)
    with recorder, recorder.phase("step"):
        with recorder.phase("forward"):
            loss = F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum() + (q @ k.mT).sum()
        with recorder.phase("backward"):
            loss.backward()
    products = {operation.op: operation.causal for operation in recorder.trace().operations if operation.flops}
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert products == {attention: causal, f"{attention}_backward": causal, "bmm": False}


def test_by_keyword_and_by_place() -> None:
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert is_causal(attention, (0, 0, 0, 0.0, True), {})
    assert not is_causal(attention, (0, 0, 0, 0.0, False), {})
    assert is_causal(attention, (0, 0, 0), {"is_causal": True})
    assert not is_causal(attention, (0, 0, 0), {})
    assert not is_causal(torch.ops.aten.mm.default, (True,) * 9, {})
