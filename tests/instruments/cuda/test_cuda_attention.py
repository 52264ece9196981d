"""CUDA's choice of an attention kernel, against the rules as PyTorch documents and tests them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_runs import operations_on
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bptool.gpus import gpu_named
from bptool.instruments.cuda.attention import Call, chosen_backend
from bptool.instruments.cuda.stand_in import standing_in_for_cuda

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def call(
    dtype: torch.dtype = BF16, *, heads: int = 4, kv_heads: int = 4, tokens: int = 64, width: int = 64, **rest: Any
) -> Call:
    query = torch.empty(2, heads, tokens, width, dtype=dtype, requires_grad=True)
    key, value = (torch.empty(2, kv_heads, tokens, width, dtype=dtype) for _ in range(2))
    return Call(query, key, value, **rest)


def choice(gpu: str, *args: Any, **kwargs: Any) -> str:
    return chosen_backend(call(*args, **kwargs), gpu_named(gpu))


@pytest.mark.parametrize(
    ("gpu", "dtype", "expected"),
    [
        ("b200", BF16, "cudnn"),
        ("h100", BF16, "cudnn"),
        ("h100", FP16, "cudnn"),
        ("a100-40gb", BF16, "flash"),
        ("rtx4090", BF16, "flash"),
        ("rtx5090", BF16, "flash"),  # cuDNN is preferred on compute capability 9 and 10 alone
        ("v100-16gb", FP16, "efficient"),
        ("v100-16gb", BF16, "math"),
        ("h100", FP32, "efficient"),
        ("v100-16gb", FP32, "efficient"),
        ("h100", FP64, "math"),
    ],
)
def test_by_gpu_and_dtype(gpu: str, dtype: torch.dtype, expected: str) -> None:
    assert choice(gpu, dtype, is_causal=True) == expected


@pytest.mark.parametrize(
    ("gpu", "settings", "expected"),
    [
        ("h100", {"dropout": 0.1}, "flash"),  # cuDNN drops in steps of 1/16
        ("h100", {"dropout": 0.125}, "cudnn"),
        ("h100", {"width": 136}, "flash"),
        ("h100", {"width": 100}, "flash"),  # is padded to 104
        ("a100-40gb", {"width": 256}, "flash"),
        ("a100-40gb", {"width": 264}, "efficient"),
        ("rtx4090", {"width": 192}, "flash"),
        ("rtx4090", {"width": 200}, "efficient"),  # not enough shared memory for its backward
        ("rtx4090", {"width": 256}, "flash"),
        ("rtx4090", {"width": 256, "dropout": 0.1}, "efficient"),
        ("h100", {"dtype": FP32, "width": 30}, "math"),
        ("a100-40gb", {"dtype": FP32, "width": 12}, "efficient"),
        ("a100-40gb", {"kv_heads": 2, "enable_gqa": True}, "flash"),
        ("h100", {"kv_heads": 2, "enable_gqa": True}, "cudnn"),
        ("h100", {"dtype": FP32, "kv_heads": 2, "enable_gqa": True}, "math"),
        ("h100", {"tokens": 1}, "flash"),
    ],
)
def test_by_shape(gpu: str, settings: dict[str, Any], expected: str) -> None:
    assert choice(gpu, **settings) == expected


@pytest.mark.parametrize(("gpu", "expected"), [("h100", "cudnn"), ("a100-40gb", "efficient")])
def test_a_mask(gpu: str, expected: str) -> None:
    assert choice(gpu, mask=torch.zeros(64, 64, dtype=BF16)) == expected


def test_keys_of_another_length_and_a_causal_mask() -> None:
    short = call()
    keys = torch.empty(2, 4, 128, 64, dtype=BF16)
    longer = Call(short.query, keys, keys, is_causal=True)
    assert chosen_backend(longer, gpu_named("a100-40gb")) == "efficient"


def test_what_is_switched_off_is_not_chosen() -> None:
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        assert choice("h100") == "efficient"
    with sdpa_kernel(SDPBackend.MATH):
        assert choice("h100") == "math"
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert choice("a100-40gb") == "cudnn"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        choice("h100", FP32)


class TestRun:
    """Forward and backward on fake tensors."""

    def run(self, gpu: str, **settings: Any) -> tuple[list[str], list[tuple[int, ...]]]:
        with operations_on(gpu) as seen:
            made = call(**settings)
            q, k, v = tensors = [t.detach().requires_grad_() for t in (made.query, made.key, made.value)]
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=made.dropout, enable_gqa=made.enable_gqa)
            y.sum().backward()
        return seen.names, [tuple(t.grad.shape) for t in tensors if t.grad is not None] + [tuple(y.shape)]

    @pytest.mark.parametrize(
        ("gpu", "settings", "op"),
        [
            ("h100", {}, "_scaled_dot_product_cudnn_attention_backward"),
            ("h100", {"kv_heads": 2, "enable_gqa": True}, "_scaled_dot_product_cudnn_attention_backward"),
            ("a100-40gb", {"kv_heads": 2, "enable_gqa": True}, "_scaled_dot_product_flash_attention_backward"),
            ("a100-40gb", {"width": 100, "dropout": 0.1}, "_scaled_dot_product_flash_attention_backward"),
            ("a100-40gb", {"dtype": FP32}, "_scaled_dot_product_efficient_attention_backward"),
            ("a100-40gb", {"dtype": FP64, "kv_heads": 2, "enable_gqa": True}, "_softmax_backward_data"),
        ],
    )
    def test_gradients_have_their_inputs_shapes(self, gpu: str, settings: dict[str, Any], op: str) -> None:
        names, shapes = self.run(gpu, **settings)
        made = call(**settings)
        assert shapes == [tuple(t.shape) for t in (made.query, made.key, made.value, made.query)]
        assert names.count(op) == 1

    def test_a_width_that_is_no_multiple_of_8_is_padded(self) -> None:
        names, _ = self.run("a100-40gb", width=100)
        forward = names[: names.index("_scaled_dot_product_flash_attention")]
        assert forward.count("constant_pad_nd") == 3
        assert "constant_pad_nd" not in self.run("a100-40gb", width=104)[0]

    @pytest.mark.parametrize(("keys", "pads"), [(64, 0), (60, 1)])
    def test_a_masks_rows_are_aligned(self, keys: int, pads: int) -> None:
        with operations_on("a100-40gb") as seen:
            q, k, v = (torch.empty(2, 4, keys, 64) for _ in range(3))
            F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(keys, keys, dtype=torch.bool))
        assert seen.count("constant_pad_nd") == pads
        assert seen.count("where") == 1


@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"scale": 0.5}, {"enable_gqa": True}])
@pytest.mark.parametrize("masked", [True, False])
def test_written_out_it_is_the_cpus_to_rounding(settings: dict[str, Any], masked: bool) -> None:
    """The kernels have no CPU code; what runs without them can be compared."""
    if masked and settings.get("is_causal"):
        return
    q = torch.rand(2, 4, 6, 8, dtype=FP64)
    k, v = (torch.rand(2, 2 if settings.get("enable_gqa") else 4, 6, 8, dtype=FP64) for _ in range(2))
    mask = torch.ones(6, 6, dtype=torch.bool).tril() if masked else None

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)

    expected = run()
    with standing_in_for_cuda(gpu_named("h100")):
        assert torch.allclose(run(), expected, rtol=1e-12, atol=0)
