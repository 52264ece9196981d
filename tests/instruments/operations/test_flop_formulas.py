"""FLOPs of single operations: by hand, and against PyTorch's own counter wherever both know an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded_operations import recorded, split
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bptool.instruments.operations.flop_formulas import attention_backward_flops, attention_flops, flops_of
from bptool.instruments.operations.recorder import OperationRecorder

aten = torch.ops.aten
Run = Callable[[], Any]


def counted(run: Run) -> int:
    with OperationRecorder() as recorder:
        run()
    return sum(operation.flops for operation in recorder.trace().operations)


def counted_by_pytorch(run: Run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def backward_of(function: Callable[..., Tensor], *shapes: tuple[int, ...], frozen: int = 0) -> Run:
    def run() -> None:
        tensors = [rand(*shape).requires_grad_(i >= frozen) for i, shape in enumerate(shapes)]
        function(*tensors).sum().backward()

    return run


class TestAgainstPyTorch:
    @pytest.mark.parametrize(
        "run",
        [
            lambda: rand(3, 4) @ rand(4, 5),
            lambda: torch.addmm(rand(5), rand(3, 4), rand(4, 5)),
            lambda: rand(2, 3, 4) @ rand(2, 4, 5),
            lambda: torch.baddbmm(rand(2, 3, 5), rand(2, 3, 4), rand(2, 4, 5)),
            lambda: torch.einsum("bij,bkj->ik", rand(2, 3, 4), rand(2, 5, 4)),
            lambda: F.linear(rand(2, 3, 4), rand(5, 4), rand(5)),
            lambda: F.conv1d(rand(2, 3, 9), rand(4, 3, 3), stride=2, padding=1),
            lambda: F.conv2d(rand(2, 4, 9, 8), rand(6, 2, 3, 3), groups=2),
            lambda: F.conv3d(rand(1, 2, 5, 5, 5), rand(3, 2, 2, 2, 2), dilation=2),
            lambda: F.conv_transpose2d(rand(2, 3, 5, 5), rand(3, 4, 3, 3), stride=2),
            backward_of(torch.mm, (3, 4), (4, 5)),
            backward_of(F.linear, (2, 3, 4), (5, 4), (5,)),
            backward_of(F.conv2d, (2, 3, 9, 9), (4, 3, 3, 3)),
            backward_of(F.conv2d, (2, 3, 9, 9), (4, 3, 3, 3), frozen=1),
            backward_of(F.conv_transpose2d, (2, 3, 5, 5), (3, 4, 3, 3)),
            backward_of(F.bilinear, (3, 4), (3, 5), (6, 4, 5)),
        ],
    )
    def test_what_both_know(self, run: Run) -> None:
        assert counted(run) == counted_by_pytorch(run)

    def test_matrix_times_vector_is_ours(self) -> None:
        """Right: a product of [M, K] and [K] has M K multiply-adds. PyTorch counts none."""
        assert counted(lambda: rand(3, 4) @ rand(4)) == 2 * 3 * 4
        assert counted_by_pytorch(lambda: rand(3, 4) @ rand(4)) == 0

    def test_a_cpus_attention_is_ours(self) -> None:
        """Right: the kernel multiplies as any other attention does. PyTorch counts nothing for it (2.11 to 2.13)."""
        shape = (2, 4, 8, 16)
        run = backward_of(F.scaled_dot_product_attention, shape, shape, shape)
        each = 2 * 2 * 4 * 8 * 8 * 16
        assert counted(run) == (2 + 5) * each
        assert counted_by_pytorch(run) == 0

    def test_a_grouped_convolutions_weight_gradient_is_ours(self) -> None:
        """Right: it multiplies as often as the forward. PyTorch's counts every pair of groups."""
        run = backward_of(lambda w, x: F.conv2d(x, w, groups=2), (6, 2, 3, 3), (2, 4, 9, 9))
        forward = counted(lambda: F.conv2d(rand(2, 4, 9, 9), rand(6, 2, 3, 3), groups=2))
        assert counted(run) == 3 * forward
        assert counted_by_pytorch(run) == 4 * forward


class TestAttention:
    """Kernels of CUDA's, on fake tensors; the shapes are [B, H, T, Q]."""

    QUERY, KEY = (2, 8, 16, 32), (2, 2, 16, 32)
    SCORES = 2 * 8 * 16 * 16

    def test_by_hand(self) -> None:
        assert attention_flops(self.QUERY, self.KEY, (2, 2, 16, 24)) == 2 * self.SCORES * (32 + 24)
        backward = attention_backward_flops(self.QUERY, self.KEY, (2, 2, 16, 24))
        assert backward == 2 * self.SCORES * (32 + 24 + 24 + 32 + 32)

    @pytest.mark.parametrize("causal", [False, True])
    def test_the_backward_is_two_and_a_half_forwards(self, causal: bool) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        forward = 4 * self.SCORES * 32
        assert counted(backward_of(attend, self.QUERY, self.QUERY, self.QUERY)) == forward * 7 // 2

    def test_written_out_it_is_twice(self) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).softmax(-1) @ v

        run = backward_of(attend, self.QUERY, self.QUERY, self.QUERY)
        assert counted(run) == counted_by_pytorch(run) == 3 * 4 * self.SCORES * 32

    @pytest.mark.parametrize(
        ("kernel", "arguments"),
        [
            ("_scaled_dot_product_flash_attention", {}),
            ("_scaled_dot_product_efficient_attention", {"attn_bias": None, "compute_log_sumexp": True}),
            ("_scaled_dot_product_cudnn_attention", {"attn_bias": None, "compute_log_sumexp": True}),
        ],
    )
    def test_cudas_kernels(self, kernel: str, arguments: dict[str, Any]) -> None:
        def run() -> None:
            with FakeTensorMode():
                q, k, v = (rand(*self.QUERY, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
                getattr(aten, kernel)(q, k, v, **arguments)[0].sum().backward()

        assert counted(run) == counted_by_pytorch(run) == 7 * 2 * self.SCORES * 32

    def test_heads_behind_tokens(self) -> None:
        """Right is ours: [B, T, H, Q] has H T T scores. PyTorch takes the heads for the tokens."""

        def run() -> None:
            with FakeTensorMode():
                q, k, v = (rand(2, 16, 8, 32, dtype=torch.bfloat16) for _ in range(3))
                aten._flash_attention_forward(q, k, v, None, None, 16, 16, 0.0, True, False)

        assert counted(run) == 4 * 2 * 8 * 16 * 16 * 32
        assert counted_by_pytorch(run) == 4 * 2 * 16 * 8 * 8 * 32


class TestGroupedProducts:
    """[M, K] x [E, K, N]; by rows, by columns, or by what is summed over, each number is multiplied once."""

    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ((32, 16), (4, 16, 8), 2 * 32 * 16 * 8),
            ((4, 32, 16), (16, 8), 2 * 32 * 16 * 8),
            ((32, 16), (16, 8), 2 * 32 * 16 * 8),
            ((4, 32, 16), (4, 16, 8), 4 * 2 * 32 * 16 * 8),
        ],
    )
    def test_by_hand(self, a: tuple[int, ...], b: tuple[int, ...], expected: int) -> None:
        found = flops_of(aten._grouped_mm.default, (torch.empty(a), torch.empty(b)), {}, torch.empty(()))
        assert found == (expected,)


class TestModels:
    """PyTorch's own modules, by hand."""

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_multihead_attention(self, need_weights: bool) -> None:
        """Projections by a packed weight; the fused kernel where no weights are wanted."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(16, 16)
                self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                x = self.first(x)
                y: Tensor = self.attention(x, x, x, need_weights=need_weights)[0]
                return y

        trace = recorded(Model(), rand(2, 5, 16))
        projections, scores = 4 * 2 * 10 * 16 * 16, 2 * 2 * 5 * 5 * 16
        rescored = 0 if need_weights else scores
        assert split(trace, "attention") == (
            projections + 2 * scores,
            projections + 4 * scores + rescored,
            projections,
            0,
        )

    def test_a_gru(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.gru = nn.Linear(6, 6), nn.GRU(6, 7)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.gru(self.first(x))[0]
                return y

        forward, dgrad, wgrad, _ = split(recorded(Model(), rand(3, 2, 6)), "gru")
        assert forward == wgrad == 2 * 3 * 2 * 3 * 7 * (6 + 7)
        assert dgrad in (forward, forward - 2 * 2 * 3 * 7 * 7)  # the first state's gradient is not wanted

    def test_transformers_gpt2_and_llama(self) -> None:
        transformers = pytest.importorskip("transformers")
        batch, tokens, width, words, layers = 2, 8, 16, 40, 2
        gpt2 = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=words,
                n_positions=16,
                n_embd=width,
                n_layer=layers,
                n_head=2,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=words,
                hidden_size=width,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=16,
                use_cache=False,
            )
        )
        ids = torch.randint(words, (batch, tokens))
        rows = batch * tokens
        scores = layers * 2 * batch * tokens * tokens * width
        for model, weights in [(gpt2, 12 * width * width), (llama, 3 * width * width + 3 * width * 48)]:
            trace = recorded(model.eval(), ids, loss=lambda out: out.logits.sum())  # dropout takes another kernel
            products = 2 * rows * (layers * weights + width * words)
            forward, dgrad, wgrad, again = split(trace)
            assert (forward - 2 * scores, dgrad - 5 * scores, wgrad, again) == (products, products, products, 0)
