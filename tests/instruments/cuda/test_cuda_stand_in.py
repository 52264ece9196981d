"""CPU tensors in CUDA's stead, against independent counts and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_runs import operations_on, peak_bytes, simulate_on
from small_runs import small_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bptool.gpus import gpu_named
from bptool.instruments.cuda.stand_in import standing_in_for_cuda
from bptool.instruments.memory.ledger import MemoryLedger
from bptool.training.workload import Workload, transformer_workload

H100, A100, V100 = "h100", "a100-40gb", "v100-32gb"
GIB = 2**30
B, S, D, HEADS, LAYERS = 8, 1024, 768, 12, 12

# On real tensors transformers sees that nothing is padded and makes no mask, which takes reading values. An attention
# that it knows no mask for gets none either, and is causal.
AttentionInterface.register("sdpa_unmasked", sdpa_attention_forward)


def gpt2(attention: str, dropout: float) -> Workload:
    """Hugging Face's GPT-2 124M on 8 sequences of 1024 tokens."""
    config = GPT2Config(
        attn_implementation=attention,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        loss_type="ForCausalLM",
    )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        result: Tensor = model(input_ids=batch["ids"], labels=batch["ids"], use_cache=False).loss
        return result

    return Workload(
        model=lambda: GPT2LMHeadModel(config),
        batch=lambda generator: {"ids": torch.zeros(B, S, dtype=torch.long)},
        loss=loss,
    )


class TestGPT2:
    """The peak of the second step in float32, against a count that was made independently of bptool."""

    @pytest.mark.parametrize(("attention", "gib"), [("sdpa_unmasked", 13.920), ("eager", 18.415)])
    def test_without_dropout(self, attention: str, gib: float) -> None:
        assert peak_bytes(simulate_on(A100, gpt2(attention, 0.0))) / GIB == pytest.approx(gib, abs=0.0005)

    def test_with_dropout(self) -> None:
        """CUDA keeps a byte for each element dropped where a CPU keeps a float: 28.001 GiB by the independent count."""
        dropped = LAYERS * B * HEADS * S * S + (1 + 2 * LAYERS) * B * S * D
        expected = 28.001 * GIB - 3 * dropped
        assert peak_bytes(simulate_on(A100, gpt2("eager", 0.1))) == pytest.approx(expected, abs=0.0005 * GIB)


def saved_bytes(gpu: str, function: Callable[[], Tensor]) -> int:
    """What a function leaves for its backward, its result and what it was given included."""
    with FakeTensorMode(), standing_in_for_cuda(gpu_named(gpu)), MemoryLedger(counts_host=False) as ledger:
        result = function()
        held = int(ledger.trace().live_bytes[-1])
        del result
    return held


class TestDropout:
    def test_fused_with_a_boolean_mask(self) -> None:
        x = 4 * 1000
        held = saved_bytes(H100, lambda: F.dropout(torch.rand(1000, requires_grad=True), 0.1))
        assert held == x + x + 1000

    @pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.1, False)])
    def test_what_drops_nothing_does_nothing(self, p: float, training: bool) -> None:
        with operations_on(H100) as seen:
            F.dropout(torch.rand(10), p, training)
        assert seen.names == ["rand"]

    def test_everything_dropped(self) -> None:
        with standing_in_for_cuda(gpu_named(H100)):
            assert F.dropout(torch.ones(3), 1.0).tolist() == [0, 0, 0]


class TestMegatronsLayer:
    """Activations of a transformer layer in half precision: sbh (34 + 5as/h) bytes (Korthikanti et al. 2022, eq. 1).

    Their count leaves out the normalisations' statistics, 2 float32 numbers for each row of each.
    """

    s, b, h, a = 128, 4, 256, 8

    def layer(self, dtype: torch.dtype) -> nn.Module:
        h, a = self.h, self.a
        norm, linear = partial(nn.LayerNorm, dtype=dtype), partial(nn.Linear, dtype=dtype)

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norms = nn.ModuleList(norm(h) for _ in range(2))
                self.qkv, self.out = linear(h, 3 * h), linear(h, h)
                self.up, self.down = linear(h, 4 * h), linear(4 * h, h)

            def forward(self, x: Tensor) -> Tensor:
                q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, a, h // a)).permute(2, 0, 3, 1, 4)
                weights = F.dropout((q @ k.mT * (h // a) ** -0.5).softmax(-1), 0.1)
                x = x + F.dropout(self.out((weights @ v).transpose(1, 2).flatten(2)), 0.1)
                return x + F.dropout(self.down(F.gelu(self.up(self.norms[1](x)))), 0.1)

        return Layer()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_activations_by_their_formula(self, dtype: torch.dtype) -> None:
        s, b, h, a = self.s, self.b, self.h, self.a
        with FakeTensorMode(), standing_in_for_cuda(gpu_named(A100)), MemoryLedger(counts_host=False) as ledger:
            layer = self.layer(dtype)
            x = torch.rand(b, s, h, dtype=dtype, requires_grad=True)
            before = int(ledger.trace().live_bytes[-1])
            y = layer(x)
            held = int(ledger.trace().live_bytes[-1]) - before
            del y  # the next layer's input, in this layer's stead
        statistics = 2 * 2 * 4 * s * b
        assert held - statistics == s * b * h * (34 + 5 * a * s / h)


class TestRMSNorm:
    def test_one_number_is_kept_for_each_row(self) -> None:
        rows, width = 6, 64

        def normed() -> Tensor:
            return F.rms_norm(torch.rand(rows, width, requires_grad=True), (width,), torch.ones(width))

        assert saved_bytes(H100, normed) == 4 * (2 * rows * width + width + rows)

    @pytest.mark.parametrize("has_weight", [True, False])
    def test_its_backward_is_one_operation(self, has_weight: bool) -> None:
        with operations_on(H100) as seen:
            x = torch.rand(5, 8, requires_grad=True)
            weight = torch.rand(8, requires_grad=True) if has_weight else None
            F.rms_norm(x, (8,), weight).sum().backward()
        after = seen.names[seen.names.index("expand") + 1 :]  # the sum's own backward
        assert [name for name in after if name != "detach"] == ["_fused_rms_norm_backward"]
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert weight is None or weight.grad is not None

    @pytest.mark.filterwarnings("ignore:Mismatch dtype")
    def test_unequal_dtypes_are_not_fused(self) -> None:
        with operations_on(H100) as seen:
            F.rms_norm(torch.rand(2, 8, dtype=torch.bfloat16), (8,), torch.ones(8))
        assert "_fused_rms_norm" not in seen.names


class TestSoftmax:
    @pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
    @pytest.mark.parametrize(
        ("dtype", "copies"),
        [(torch.float16, 0), (torch.bfloat16, 1), (torch.float32, 0)],
    )
    def test_only_float16_goes_straight_to_float32(
        self, function: Callable[..., Tensor], dtype: torch.dtype, copies: int
    ) -> None:
        with operations_on(H100) as seen:
            assert function(torch.rand(3, dtype=dtype), -1, dtype=torch.float32).dtype == torch.float32
        assert seen.count("_to_copy") == copies


def test_layer_norms_statistics_are_float32() -> None:
    rows, width = 6, 64

    def normed() -> Tensor:
        return F.layer_norm(torch.rand(rows, width, dtype=torch.bfloat16, requires_grad=True), (width,))

    assert saved_bytes(H100, normed) == 2 * 2 * rows * width + 2 * 4 * rows


class TestBuiltInTransformer:
    def shaped(self, **changes: Any) -> tuple[dict[str, Any], Workload]:
        shape = {"model.n_layers": 2, "model.d_model": 64, "model.n_heads": 4, "model.d_ff": 128, **changes}
        return shape, transformer_workload(small_config(shape))

    def ops(self, gpu: str, **changes: Any) -> list[str]:
        shape, workload = self.shaped(**changes)
        return [allocation.op.removeprefix("aten.") for allocation in simulate_on(gpu, workload, shape).allocations]

    @pytest.mark.parametrize(
        ("gpu", "mode", "dropout", "op"),
        [
            (H100, "bf16-mixed", 0.0, "_scaled_dot_product_cudnn_attention"),
            (H100, "bf16-mixed", 0.1, "_scaled_dot_product_flash_attention"),
            (A100, "bf16-mixed", 0.0, "_scaled_dot_product_flash_attention"),
            (A100, "bf16", 0.0, "_scaled_dot_product_flash_attention"),
            (A100, "fp32", 0.0, "_scaled_dot_product_efficient_attention"),
            (V100, "fp16-mixed", 0.0, "_scaled_dot_product_efficient_attention"),
            (V100, "bf16-mixed", 0.0, "_safe_softmax"),  # written out: no fused kernel takes bf16 there,
        ],
    )
    def test_its_attention(self, gpu: str, mode: str, dropout: float, op: str) -> None:
        assert op in self.ops(gpu, **{"precision.mode": mode, "model.dropout": dropout})

    def test_float32_groups_are_copied_to_heads_as_on_a_gpu(self) -> None:
        """The model asks what it runs on; asked for groups, CUDA's float32 kernel would give way to all the weights."""
        ops = self.ops(A100, **{"model.n_kv_heads": 2})
        assert "_scaled_dot_product_efficient_attention" in ops
        assert "_safe_softmax" not in ops

    @pytest.mark.parametrize(("implementation", "counters"), [("loop", 0), ("foreach", 0), ("fused", 1)])
    def test_an_optimizers_counters_are_the_devices_only_where_it_is_fused(
        self, implementation: str, counters: int
    ) -> None:
        shape, workload = self.shaped(**{"optimizer.implementation": implementation})
        trace = simulate_on(A100, workload, shape)
        n_parameters = len([a for a in trace.allocations if a.category == "parameters"])
        scalars = [
            a for a in trace.live_at(len(trace.events) - 1) if a.tensor == "float32[]" and a.phase == "optimizer"
        ]
        assert len(scalars) == counters * n_parameters


def test_it_ends_with_the_context() -> None:
    x = torch.rand(3, requires_grad=True)
    with standing_in_for_cuda(gpu_named(H100)):
        assert type(F.dropout(x, 0.5).grad_fn).__name__ == "NativeDropoutBackward0"
    assert type(F.dropout(x, 0.5).grad_fn).__name__ == "MulBackward0"
