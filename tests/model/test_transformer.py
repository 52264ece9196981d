from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bptool.config.schema import ModelSettings
from bptool.model.transformer import Transformer, build

GPT2 = {
    "norm": "layernorm",
    "position": "learned",
    "activation": "gelu-tanh",
    "bias": True,
    "tied_embeddings": True,
}
LLAMA = {"n_kv_heads": 2, "tied_embeddings": False}
GEMMA = {
    "norm": "rmsnorm-offset",
    "post_norm": True,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
    "rope": {"theta": 500.0, "local_theta": 50.0},
    "query_scale_dim": 9,
    "attention_softcap": 2.0,
    "activation": "geglu-tanh",
    "scaled_embeddings": True,
    "logit_softcap": 3.0,
}
QWEN = {"n_kv_heads": 2, "qkv_bias": True, "sliding_window": 6, "rope": {"scaling": "yarn", "factor": 2.0}}
EXPERTS = {"n_experts": 5, "d_expert": 6, "n_active": 3, "n_shared": 1, "n_dense_layers": 1}
GROUPS = {"n_experts": 6, "n_groups": 3, "n_active_groups": 2, "router": "sigmoid", "weight_scale": 2.5}
LATENT = {"kv_rank": 6, "q_rank": 5, "nope_dim": 3, "rope_dim": 4, "value_dim": 2}
STYLES = pytest.mark.parametrize(
    "style",
    [GPT2, LLAMA, {"qk_norm": True, "norm": "none"}, GEMMA, QWEN, {"moe": EXPERTS}, {"moe": GROUPS}, {"mla": LATENT}],
    ids=["gpt2", "llama", "odd", "gemma", "qwen", "experts", "groups", "latent"],
)


def settings(**keys: Any) -> ModelSettings:
    small = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 24, "vocab_size": 13, "context_length": 12}
    return ModelSettings.model_validate({**small, "init_std": 0.3, **keys})


def model(**keys: Any) -> Transformer:
    return build(settings(**keys), device="cpu", seed=1, dtype=torch.float64)


def tokens(n_sequences: int = 2, n_tokens: int = 9) -> Tensor:
    return torch.randint(13, (n_sequences, n_tokens))


def without_branches(**keys: Any) -> Transformer:
    """A model whose attention and feed-forward put out nothing."""
    transformer = model(**keys)
    with torch.no_grad():
        for block in transformer.blocks:
            for name, parameter in block.named_parameters():
                if name.startswith(("attention.output", "feed_forward.down")):
                    parameter.zero_()
    return transformer


def test_parameter_names() -> None:
    def block(number: int, names: str) -> list[str]:
        return [f"blocks.{number}.{name}" for name in names.split()]

    llama = (
        "attention_norm.weight attention.query.weight attention.key.weight attention.value.weight"
        " attention.output.weight feed_forward_norm.weight feed_forward.gate.weight feed_forward.up.weight"
        " feed_forward.down.weight"
    )
    wanted = ["embedding.weight", *block(0, llama), *block(1, llama), "final_norm.weight", "head.weight"]
    assert list(model(**LLAMA).state_dict()) == wanted
    gpt2 = (
        "attention_norm.weight attention_norm.bias attention.query.weight attention.query.bias attention.key.weight"
        " attention.key.bias attention.value.weight attention.value.bias attention.output.weight"
        " attention.output.bias feed_forward_norm.weight feed_forward_norm.bias feed_forward.up.weight"
        " feed_forward.up.bias feed_forward.down.weight feed_forward.down.bias"
    )
    both_norms = ["final_norm.weight", "final_norm.bias"]
    wanted = ["embedding.weight", "position.weight", *block(0, gpt2), *block(1, gpt2), *both_norms]
    assert list(model(**GPT2).state_dict()) == wanted
    assert set(model(qk_norm=True).state_dict()) - set(model().state_dict()) == {
        f"blocks.{i}.attention.{kind}_norm.weight" for i in (0, 1) for kind in ("query", "key")
    }


@STYLES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_token_sees_no_later_one(style: dict[str, Any], attention: str) -> None:
    transformer, ids = model(**style, attention=attention), tokens()
    before = transformer(ids)
    ids[:, 5] = (ids[:, 5] + 1) % 13
    after = transformer(ids)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-12)
    assert ((after - before).abs().amax(-1)[:, 5:] > 1e-6).all()


@STYLES
@pytest.mark.parametrize("loss", ["fused", "plain"])
def test_the_loss_is_the_cross_entropy_of_the_logits(style: dict[str, Any], loss: str) -> None:
    transformer, ids, targets = model(**style).eval(), tokens(), tokens()
    targets[0, 3] = -100
    logits = transformer(ids).detach()
    wanted = [
        math.log(logits[b, t].exp().sum()) - logits[b, t, targets[b, t]].item()
        for b in range(2)
        for t in range(9)
        if targets[b, t] >= 0
    ]
    found = transformer(ids, targets, loss=loss)
    assert found.item() == pytest.approx(sum(wanted) / 17, rel=1e-12)
    assert ("LinearCrossEntropy" in found.grad_fn.name()) == (loss == "fused")


@STYLES
def test_fused_and_plain_loss_and_attention_give_equal_gradients(style: dict[str, Any]) -> None:
    ids, targets = tokens(), tokens()
    found = []
    for attention, loss in (("sdpa", "fused"), ("eager", "plain")):
        transformer = model(**style, attention=attention)
        transformer(ids, targets, loss=loss).backward()
        found.append([parameter.grad for parameter in transformer.parameters() if parameter.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "none"])
@pytest.mark.parametrize("position", ["learned", "rope", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_without_branches_a_model_is_its_embedding_norm_and_head(norm: str, position: str, tied: bool) -> None:
    transformer = without_branches(norm=norm, position=position, tied_embeddings=tied)
    weights, ids = transformer.state_dict(), tokens()
    x = weights["embedding.weight"][ids]
    if position == "learned":
        x = x + weights["position.weight"][:9]
    if norm == "layernorm":
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    elif norm == "rmsnorm":
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    head = weights["embedding.weight"] if tied else weights["head.weight"]
    torch.testing.assert_close(transformer(ids), x @ head.T, rtol=1e-10, atol=1e-12)


def test_without_residual_the_branch_replaces_its_input() -> None:
    assert not without_branches(residual=False, norm="none")(tokens()).any()
    transformer = model(residual=False, norm="none", n_layers=1, position="none")
    block: Any = transformer.blocks[0]
    ids = tokens()
    x = block.feed_forward(block.attention(transformer.embedding(ids), None))
    torch.testing.assert_close(transformer(ids), x @ transformer.embedding.weight.T, rtol=1e-12, atol=1e-12)


def test_only_position_tells_equal_tokens_apart() -> None:
    """In a row of one token all attend to equal values, which rope does not touch; in a mixed row the order counts."""
    ids = torch.full((1, 9), 4)
    for position, differs in (("none", False), ("learned", True)):
        logits = model(position=position)(ids)[0]
        assert ((logits - logits[0]).abs().max() > 1e-6) == differs
    mixed = tokens(1)
    swapped = mixed[:, [1, 0, *range(2, 9)]]
    assert mixed[0, 0] != mixed[0, 1]
    for position, differs in (("none", False), ("rope", True), ("learned", True)):
        transformer = model(position=position, n_layers=1)
        changed = (transformer(mixed) - transformer(swapped))[0, 2:].abs().max() > 1e-6
        assert changed == differs, position


def test_dropout_is_active_in_training_alone() -> None:
    ids = tokens()
    dropping = model(dropout=0.3)
    plain = model()
    assert not torch.equal(dropping(ids), dropping(ids))
    torch.testing.assert_close(dropping.eval()(ids), plain(ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("place", "silent"),
    [
        ("embedding", ["attention.output", "feed_forward.down"]),
        ("attention", ["feed_forward.down"]),
        ("feed_forward", ["attention.output"]),
    ],
)
def test_dropout_falls_where_the_schema_says(place: str, silent: list[str]) -> None:
    """What a block gets after the embedding, and what each of its branches adds, has zeros for a share of `dropout`."""
    transformer = model(dropout=0.25, d_model=64, d_ff=64, norm="none").train()
    block = transformer.blocks[0]
    seen: dict[str, Tensor] = {}
    block.register_forward_pre_hook(lambda _, args: seen.__setitem__("input", args[0].detach()))
    block.register_forward_hook(lambda _, args, out: seen.__setitem__("output", out.detach()))
    with torch.no_grad():
        for name in silent:
            block.get_parameter(f"{name}.weight").zero_()
    transformer(torch.randint(13, (50, 12)))
    added = seen["input"] if place == "embedding" else seen["output"] - seen["input"]
    assert (added == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)


def test_initial_weights() -> None:
    transformer = build(
        settings(d_model=128, n_heads=4, d_ff=256, n_layers=8, bias=True, norm="layernorm"), device="cpu", seed=3
    )
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0.0 if name.endswith(".bias") else 1.0)).all()
            continue
        branch_output = "attention.output" in name or "feed_forward.down" in name
        std = 0.3 / math.sqrt(2 * 8) if branch_output else 0.3
        assert parameter.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * parameter.numel())), name
        assert parameter.mean().item() == pytest.approx(0, abs=6 * std / math.sqrt(parameter.numel())), name


@pytest.mark.parametrize("keys", [{"qk_norm": True, "post_norm": True}, {"mla": LATENT}], ids=["heads", "latent"])
def test_an_offset_begins_at_zero_where_a_scale_begins_at_one(keys: dict[str, Any]) -> None:
    offset, scale = (build(settings(norm=norm, **keys), device="cpu", seed=3) for norm in ("rmsnorm-offset", "rmsnorm"))
    assert all((parameter == 0).all() for parameter in offset.parameters() if parameter.ndim == 1)
    ids = tokens()
    torch.testing.assert_close(offset(ids), scale(ids))


def test_a_window_as_long_as_the_text_is_none() -> None:
    ids = tokens()
    without, wide, narrow = (model(sliding_window=window)(ids) for window in (0, 9, 8))
    assert torch.equal(without, wide)
    assert torch.equal(without[:, :8], narrow[:, :8])
    assert not torch.equal(without[:, 8], narrow[:, 8])


def test_every_third_block_sees_everything() -> None:
    transformer = model(n_layers=6, sliding_window=2, sliding_window_pattern=3)
    seen: list[bool] = []
    for block in transformer.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[2] is None))
    transformer(tokens())
    assert seen == [False, False, True] * 2


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    def weight(name: str, seed: int = 1, **keys: Any) -> Tensor:
        return build(settings(**keys), device="cpu", seed=seed).get_parameter(name)

    name = "blocks.1.attention.query.weight"
    torch.manual_seed(5)
    first = weight(name)
    assert torch.equal(first, weight(name, n_layers=4, position="learned", tied_embeddings=False))
    assert not torch.equal(first, weight(name, seed=2))
    assert not torch.equal(first, weight("blocks.0.attention.query.weight"))
    assert not torch.equal(first, weight("blocks.1.attention.key.weight"))


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    model()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_huge_model_on_meta_takes_no_memory() -> None:
    huge = settings(n_layers=126, d_model=16384, n_heads=128, n_kv_heads=8, d_ff=53248, vocab_size=128256)
    transformer = build(huge, device="meta", seed=0, dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in transformer.parameters())
    assert transformer(torch.empty(1, 12, dtype=torch.int64, device="meta")).shape == (1, 12, 128256)


@STYLES
def test_runs_on_fake_tensors(style: dict[str, Any]) -> None:
    with FakeTensorMode():
        transformer = build(settings(**style), device="cpu", seed=0)
        transformer(tokens(), tokens(), loss="fused").backward()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)


def test_a_recomputed_block_gives_the_same_gradients() -> None:
    ids, targets = tokens(), tokens()
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        transformer = model(dropout=0.2)
        for block in transformer.blocks if recompute else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        transformer(ids, targets).backward()
        found.append([parameter.grad for parameter in transformer.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "rmsnorm-offset", "none"])
def test_autocast_and_bfloat16_stay_near_float64(norm: str, qk_norm: bool) -> None:
    keys: dict[str, Any] = {"norm": norm, "qk_norm": qk_norm, "n_kv_heads": 2, "init_std": 0.1}
    keys |= {"sliding_window": 4, "attention_softcap": 5.0 * qk_norm, "logit_softcap": 5.0 * qk_norm}
    ids, targets = tokens(), tokens()
    exact = model(**keys)(ids, targets).item()
    single = build(settings(**keys), device="cpu", seed=1)
    single.load_state_dict(model(**keys).state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = single(ids, targets, loss="fused")
    mixed.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in single.parameters())
    half = single.to(torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16
    assert mixed.item() == pytest.approx(exact, rel=0.01)
    assert half(ids, targets, loss="fused").item() == pytest.approx(exact, rel=0.02)


def test_a_sequence_beyond_the_context_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        model()(tokens(1, 13))


def test_blocks_are_in_a_module_list() -> None:
    assert isinstance(model().blocks, nn.ModuleList)
