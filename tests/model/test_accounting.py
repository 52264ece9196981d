from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bptool.config.schema import ModelSettings
from bptool.model.accounting import block_flops_per_token, count_parameters, flops_per_token
from bptool.model.transformer import Transformer, build


@st.composite
def model_settings(draw: st.DrawFn) -> ModelSettings:
    n_kv_heads = draw(st.integers(1, 3))
    n_layers, biased = draw(st.integers(1, 3)), draw(st.booleans())
    experts = {
        "n_experts": 0 if biased else draw(st.sampled_from([0, 4, 6])),
        "n_active": draw(st.integers(1, 4)),
        "d_expert": draw(st.integers(1, 9)),
        "n_shared": draw(st.integers(0, 2)),
        "n_dense_layers": draw(st.integers(0, n_layers - 1)),
        "router": draw(st.sampled_from(["softmax", "sigmoid"])),
    }
    keys = {
        "moe": experts,
        "bias": biased,
        "n_layers": n_layers,
        "d_model": draw(st.integers(1, 12)),
        "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * draw(st.integers(1, 3)),
        "head_dim": 2 * draw(st.integers(1, 4)),
        "d_ff": draw(st.integers(1, 20)),
        "vocab_size": draw(st.integers(1, 30)),
        "context_length": draw(st.integers(8, 20)),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm", "rmsnorm-offset", "none"])),
        "position": draw(st.sampled_from(["learned", "rope", "none"])),
        "activation": draw(st.sampled_from(["gelu", "swiglu", "geglu-tanh"])),
        **{key: draw(st.booleans()) for key in ("qkv_bias", "qk_norm", "post_norm", "tied_embeddings")},
        "sliding_window": draw(st.integers(0, 9)),
        "sliding_window_pattern": draw(st.integers(0, 2)),
        "attention_softcap": draw(st.sampled_from([0.0, 5.0])),
    }
    if not biased and draw(st.booleans()):
        ranks = {"kv_rank": draw(st.integers(1, 5)), "q_rank": draw(st.integers(0, 5))}
        dims = {"nope_dim": draw(st.integers(1, 5)), "rope_dim": 2, "value_dim": draw(st.integers(1, 5))}
        keys |= {"mla": ranks | dims, "head_dim": "auto", "n_kv_heads": "auto", "qk_norm": False, "qkv_bias": False}
    return ModelSettings.model_validate(keys)


@given(model_settings())
@hypothesis_settings(max_examples=60, deadline=None)
def test_parameters_are_those_of_the_module(settings: ModelSettings) -> None:
    with torch.device("meta"):
        model = Transformer(settings)
    parts = count_parameters(settings)
    assert parts.total == sum(p.numel() for p in model.parameters())
    for name in ("embedding", "position", "blocks", "final_norm", "head"):
        module = getattr(model, name)
        assert getattr(parts, name) == sum(p.numel() for p in (module.parameters() if module else ())), name


def gpt2(n_layers: int, d_model: int, n_heads: int) -> ModelSettings:
    """The shapes of the config.json files of openai-community/gpt2 and its larger sisters."""
    return ModelSettings(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        vocab_size=50257,
        context_length=1024,
        norm="layernorm",
        position="learned",
        activation="gelu-tanh",
        bias=True,
        tied_embeddings=True,
    )


def llama3(n_layers: int, d_model: int, n_heads: int, d_ff: int, **keys: Any) -> ModelSettings:
    """The shapes of the config.json files of meta-llama's models."""
    shapes = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": 8, "d_ff": d_ff}
    return ModelSettings.model_validate({**shapes, "vocab_size": 128256, "tied_embeddings": False, **keys})


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        pytest.param(gpt2(12, 768, 12), 124_439_808, id="gpt2"),
        pytest.param(gpt2(24, 1024, 16), 354_823_168, id="gpt2-medium"),
        pytest.param(gpt2(36, 1280, 20), 774_030_080, id="gpt2-large"),
        pytest.param(gpt2(48, 1600, 25), 1_557_611_200, id="gpt2-xl"),
        pytest.param(llama3(16, 2048, 32, 8192, tied_embeddings=True), 1_235_814_400, id="llama3.2-1b"),
        pytest.param(llama3(32, 4096, 32, 14336), 8_030_261_248, id="llama3-8b"),
        pytest.param(llama3(80, 8192, 64, 28672), 70_553_706_496, id="llama3-70b"),
        pytest.param(llama3(126, 16384, 128, 53248), 405_853_388_800, id="llama3-405b"),
    ],
)
def test_published_parameter_counts(settings: ModelSettings, published: int) -> None:
    assert count_parameters(settings).total == published


@given(model_settings(), st.integers(1, 8))
@hypothesis_settings(max_examples=30, deadline=None)
def test_flops_are_those_that_torch_counts(settings: ModelSettings, sequence_length: int) -> None:
    """A third of it is the forward, with attention written out so that both its products are seen in full."""
    model = build(settings.model_copy(update={"attention": "eager"}), device="meta", seed=0)
    tokens = torch.empty(2, sequence_length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    assert 3 * counter.get_total_flops() == flops_per_token(settings, sequence_length) * tokens.numel()


def test_a_blocks_flops_part_by_part() -> None:
    """By hand: 2 x (4 x 16 x 16), scores and their sum 2 x 2 x 8 x 16, and 2 x (2 x 16 x 64)."""
    settings = ModelSettings(d_model=16, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=64, activation="gelu")
    block = block_flops_per_token(settings, 0, 8)
    assert (block.attention_matrices, block.scores, block.feed_forward) == (2048, 512, 4096)


def test_backward_is_twice_the_forward() -> None:
    """All of forward and backward, where the first layer's input needs a gradient as every other layer's does."""
    settings = ModelSettings(n_layers=2, d_model=16, n_heads=2, vocab_size=11, attention="eager")
    model = build(settings, device="cpu", seed=0)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens, loss="plain").backward()
    assert counter.get_total_flops() == flops_per_token(settings, 8) * tokens.numel()


def test_the_fused_loss_does_no_more_than_the_plain_one_and_all_of_it_is_counted() -> None:
    settings = ModelSettings(n_layers=1, d_model=16, n_heads=2, vocab_size=11, attention="eager")
    model = build(settings, device="cpu", seed=0)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens, loss="fused").backward()
    assert counter.get_total_flops() == flops_per_token(settings, 8) * tokens.numel()
