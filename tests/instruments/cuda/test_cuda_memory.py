"""What kernels allocate for themselves, against the tensors that PyTorch's CUDA sources make, written down by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_runs import simulate_on
from small_runs import small_config
from torch import Tensor

from bptool.gpus import gpu_named
from bptool.instruments.cuda.memory import cublas_workspace_bytes, cuda_scratch
from bptool.training.workload import transformer_workload
from bptool.units import MIB

aten = torch.ops.aten
B, H, K, T, Q = 2, 12, 4, 1000, 64


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rows(heads: int, dtype: torch.dtype = torch.bfloat16, width: int = Q) -> Tensor:
    """[B, heads, T, width] as projections give it: contiguous as [B, T, heads, width]."""
    return empty(B, T, heads, width, dtype=dtype).transpose(1, 2)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def scratch(op: Any, *args: Any, gpu: str = "a100-40gb") -> int:
    return cuda_scratch(gpu_named(gpu))(op, args, {}, None)


class TestFlashBackward:
    op = aten._scaled_dot_product_flash_attention_backward.default

    def run(self, heads: int, width: int = Q, **changes: Tensor) -> int:
        q, k = rows(H, width=width), rows(heads, width=width)
        tensors = {"grad_out": q, "query": q, "key": k, "value": k, "out": q} | changes
        return scratch(self.op, *tensors.values())

    @pytest.mark.parametrize(("width", "rounded"), [(64, 64), (72, 96), (128, 128), (136, 192)])
    def test_float32_accumulation(self, width: int, rounded: int) -> None:
        """T is rounded up to 128, the width to 32 (above 128: 64)."""
        dq_accum, softmax_d = empty(B, 1024, H, rounded, dtype=torch.float32), empty(B, H, 1024, dtype=torch.float32)
        assert self.run(H, width) == nbytes(dq_accum, softmax_d)

    def test_groups_are_expanded(self) -> None:
        assert self.run(K) == self.run(H) + nbytes(empty(B, T, H, Q), empty(B, T, H, Q))

    def test_what_is_not_contiguous_is_copied(self) -> None:
        other = empty(B, H, T, Q)
        assert self.run(H, grad_out=other) == self.run(H) + nbytes(other)
        assert self.run(H, grad_out=other, out=other) == self.run(H) + 2 * nbytes(other)


class TestFlashForward:
    op = aten._scaled_dot_product_flash_attention.default

    def test_a_full_gpu_needs_nothing(self) -> None:
        assert scratch(self.op, rows(H), rows(H), rows(H)) == 0

    @pytest.mark.parametrize(("tokens", "splits"), [(1024, 4), (64, 1)])
    def test_one_sequence_with_one_head_is_split_along_the_keys(self, tokens: int, splits: int) -> None:
        """16 blocks for 216 half processors: 4 splits of 256 keys, the most there are, fill the most."""
        q = empty(1, 1, tokens, Q)
        out_accum = empty(splits, 1, 1, tokens, Q, dtype=torch.float32)
        lse_accum = empty(splits, 1, 1, tokens, dtype=torch.float32)
        assert scratch(self.op, q, q, q) == (nbytes(out_accum, lse_accum) if splits > 1 else 0)

    def test_dropout_is_never_split(self) -> None:
        q = empty(1, 1, 1024, Q)
        assert scratch(self.op, q, q, q, 0.1) == 0


class TestEfficientBackward:
    op = aten._scaled_dot_product_efficient_attention_backward.default

    def test_float32_makes_the_product_first(self) -> None:
        """Row sums of a product of output and gradient, which is larger than the tiles that come after it."""
        q = rows(H, torch.float32)
        sums = empty(B, H, T, dtype=torch.float32)
        tiles = B * H * 16 * (16 + 64 * 64 * 4)  # 16 tiles of 64 rows: a lock, a counter, padding; then the numbers
        assert scratch(self.op, q, q) == nbytes(sums) + max(nbytes(q, sums), tiles)

    def test_half_precision_sums_in_the_kernel(self) -> None:
        q = rows(H, torch.float16)
        tiles = B * H * 16 * (16 + 64 * 64 * 4)
        sums = nbytes(empty(B, H, T, dtype=torch.float32))
        assert scratch(self.op, q, q) == sums + tiles
        product = nbytes(rows(H, torch.float32)) + sums
        assert scratch(self.op, q, q, gpu="v100-16gb") == sums + max(product, tiles)


def test_cudnns_backward() -> None:
    q = rows(H)
    op = aten._scaled_dot_product_cudnn_attention_backward.default
    dq_accum, softmax_sum = empty(B, H, T, Q, dtype=torch.float32), empty(B, H, T, 1, dtype=torch.float32)
    assert scratch(op, q, q, gpu="h100") == nbytes(dq_accum, softmax_sum)


class TestEmbeddingBackward:
    op = aten.embedding_dense_backward.default

    def run(self, tokens: int, vocabulary: int, dtype: torch.dtype = torch.float32, width: int = 768) -> int:
        grad, indices = empty(tokens, width, dtype=dtype), empty(tokens, dtype=torch.int64)
        return scratch(self.op, grad, indices, vocabulary, -1, False)

    def test_few_tokens_are_not_sorted(self) -> None:
        assert self.run(3072, 50257) == 0
        assert self.run(3073, 50257) > 0

    @pytest.mark.parametrize(("vocabulary", "segments"), [(50257, 8192), (256, 256)])
    def test_sums_of_runs(self, vocabulary: int, segments: int) -> None:
        """819 runs of ten, and one that is shorter for each distinct token that there may be."""
        runs = 819 + segments
        sums = empty(runs, 768, dtype=torch.float32)
        offsets = [empty(segments, dtype=torch.int64) for _ in range(3)] + [empty(runs, dtype=torch.int64)]
        sorted_ones = [empty(8192, dtype=torch.int64) for _ in range(2)]
        assert self.run(8192, vocabulary) == nbytes(sums, *offsets, *sorted_ones)
        assert self.run(8192, vocabulary, torch.bfloat16) == self.run(8192, vocabulary)


def test_the_norm_of_all_gradients() -> None:
    """[number of tensors, chunks of 65,536 of the largest], float32."""
    tensors = [empty(65_536), empty(65_537), empty(3)]
    assert scratch(aten._foreach_norm.Scalar, tensors, 2) == nbytes(empty(3, 2, dtype=torch.float32))


class TestProducts:
    """cuBLAS reads rows or columns, with gaps; anything else is copied, whole."""

    a, b = empty(6, 8), empty(8, 4)

    @pytest.mark.parametrize("op", [aten.mm.default, aten.addmm.default])
    @pytest.mark.parametrize(
        ("factor", "copied"),
        [
            (a, False),
            (empty(8, 6).t(), False),
            (empty(6, 20)[:, :8], False),
            (empty(20, 8)[::2][:6], False),
            (empty(1, 8)[:, :1].expand(6, 8), True),  # the gradient of a sum
            (empty(6, 16)[:, ::2], True),
        ],
    )
    def test_factors(self, op: Any, factor: Tensor, copied: bool) -> None:
        bias = [empty(4)] if op is aten.addmm.default else []
        assert scratch(op, *bias, factor, self.b) == copied * 6 * 8 * 2
        assert scratch(op, *bias, self.b.t(), factor.t()) == copied * 6 * 8 * 2


def test_most_operations_take_nothing() -> None:
    assert scratch(aten.add.Tensor, rows(H), rows(H)) == 0


@pytest.mark.parametrize(("gpu", "mib"), [("h100", 32), ("h200", 32), ("a100-40gb", 8.125), ("v100-16gb", 8.125)])
def test_cublas_workspaces(gpu: str, mib: float) -> None:
    """One for the forward's thread, one for autograd's; each of 8,519,680 bytes in PyTorch's issue 95668 (an A10G)."""
    assert cublas_workspace_bytes(gpu_named(gpu)) == 2 * mib * MIB


def test_a_steps_record_has_them_while_the_kernels_run() -> None:
    shape = {"model.d_model": 64, "model.n_heads": 4, "model.d_ff": 128, "precision.mode": "bf16"}
    trace = simulate_on("a100-40gb", transformer_workload(small_config(shape)), shape)
    op = "aten._scaled_dot_product_flash_attention_backward"
    own = [a for a in trace.allocations if a.op == op and not a.tensor]
    assert len(own) == 2 * 2  # layers, steps
    n_batch, heads, width = 2, 4, 32  # 16 is rounded up
    # A rotated query is contiguous as [B, H, T, Q], and so is the output, of which the kernel makes a copy.
    copied = n_batch * heads * 16 * 16 * 2
    assert {a.n_bytes for a in own} == {n_batch * heads * 128 * (width + 1) * 4 + copied}
    assert all(a.died is not None for a in own)
