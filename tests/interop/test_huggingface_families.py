"""Each family's arithmetic, weights and config.json, held to what `transformers` computes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_models import made, read_back, transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bptool.interop.huggingface import load_weights, save_weights

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5000.0}
TYPES = ["sliding_attention", "sliding_attention", "full_attention"]


def gemma2(**keys: Any) -> Any:
    softcaps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
    keys = {"head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 9, "attn_implementation": "eager"} | keys
    return made("Gemma2Config", "Gemma2ForCausalLM", **{**softcaps, **keys})


def gemma3(**keys: Any) -> Any:
    keys = {"head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 9, "layer_types": TYPES} | keys
    return made("Gemma3TextConfig", "Gemma3ForCausalLM", **keys)


def qwen2(**keys: Any) -> Any:
    return made("Qwen2Config", "Qwen2ForCausalLM", **keys)


def mixtral(**keys: Any) -> Any:
    return made("MixtralConfig", "MixtralForCausalLM", **{"num_local_experts": 5, "num_experts_per_tok": 2, **keys})


def qwen3_moe(**keys: Any) -> Any:
    keys = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "head_dim": 10, **keys}
    return made("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **keys)


def deepseek(**keys: Any) -> Any:
    ranks = {"q_lora_rank": 10, "kv_lora_rank": 14, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 5}
    experts = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 2}
    shape = {"moe_intermediate_size": 12, "first_k_dense_replace": 1, "num_key_value_heads": 6, **ranks, **experts}
    return made("DeepseekV3Config", "DeepseekV3ForCausalLM", **{**shape, **keys})


MODELS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: made("MistralConfig", "MistralForCausalLM", sliding_window=9, head_dim=6),
    "mistral-wide-window": lambda: made("MistralConfig", "MistralForCausalLM", sliding_window=41),
    "mistral-window-of-the-text": lambda: made("MistralConfig", "MistralForCausalLM", sliding_window=40),
    "qwen2": qwen2,
    "qwen2-yarn": lambda: qwen2(rope_parameters=YARN),
    "qwen2-window": lambda: qwen2(use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "qwen3": lambda: made("Qwen3Config", "Qwen3ForCausalLM", head_dim=10, tie_word_embeddings=True),
    "gemma": lambda: made("GemmaConfig", "GemmaForCausalLM", head_dim=10),
    "gemma-one-kv-head": lambda: made("GemmaConfig", "GemmaForCausalLM", head_dim=4, num_key_value_heads=1),
    "gemma2": gemma2,
    "gemma2-uncapped": lambda: gemma2(attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": gemma3,
    "gemma3-linear": lambda: gemma3(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        }
    ),
    "mixtral": mixtral,
    "mixtral-all-experts": lambda: mixtral(num_experts_per_tok=5, sliding_window=9),
    "qwen3-moe": qwen3_moe,
    "qwen3-moe-dense-first": lambda: qwen3_moe(mlp_only_layers=[0], norm_topk_prob=True),
    "deepseek": deepseek,
    "deepseek-yarn": lambda: deepseek(rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}),
    "deepseek-whole-queries": lambda: deepseek(q_lora_rank=None, norm_topk_prob=False, n_group=1, topk_group=1),
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(53, (3, 40), generator=torch.Generator().manual_seed(1))


@each_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_transformers(name: str, attention: str, ids: Tensor, tmp_path: Path) -> None:
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path)
    mine = read_back(tmp_path, attention=attention).eval()
    with torch.no_grad():
        torch.testing.assert_close(mine(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


@each_model
@pytest.mark.parametrize("loss", ["fused", "plain"])
def test_gradients_are_those_of_transformers(name: str, loss: Any, ids: Tensor, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    mine = read_back(tmp_path).eval()  # in training, an imbalance of experts would be added
    mine(ids[:, :-1], ids[:, 1:], loss=loss).backward()
    nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    wanted = gradients(model, mine.settings, tmp_path / "gradients")
    for parameter_name, parameter in mine.named_parameters():
        if not parameter.requires_grad:  # the correction of the experts' scores
            continue
        assert parameter.grad is not None
        scale = wanted[parameter_name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, wanted[parameter_name], rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=parameter_name
        )


def gradients(model: Any, settings: Any, folder: Path) -> dict[str, Tensor]:
    """The gradients under our names: saved as if they were weights, and loaded by ours."""
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)
    return load_weights(folder, settings)


@each_model
def test_transformers_loads_what_we_save(name: str, ids: Tensor, tmp_path: Path) -> None:
    """As the family it came from, or as a plainer one that computes the same."""
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "theirs")
    mine = read_back(tmp_path / "theirs")
    save_weights(mine.state_dict(), mine.settings, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    again = read_back(tmp_path / "ours")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in mine.state_dict().items())


def test_the_auxiliary_loss_is_that_of_transformers(ids: Tensor, tmp_path: Path) -> None:
    """For one block with experts; of several, transformers takes the counts together and bptool each block's own."""
    model = mixtral(num_hidden_layers=1, output_router_logits=True, router_aux_loss_coef=0.3)
    model.save_pretrained(tmp_path)
    mine = read_back(tmp_path).train()
    targets = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)
    found, wanted = mine(ids, targets), model(ids, labels=ids).loss
    torch.testing.assert_close(found, wanted)
    assert found > mine.eval()(ids, targets) + 0.3  # K = 2 at least
    mine.train()(ids, targets, loss="fused").backward()
    wanted.backward()
    router = mine.get_parameter("blocks.0.feed_forward.router.weight").grad
    torch.testing.assert_close(router, model.model.layers[0].mlp.gate.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_one_that_also_sees(prefix: str, ids: Tensor, tmp_path: Path) -> None:
    """Files of transformers 4 and of 5 put the language model below different names."""
    model = gemma3().eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = {prefix + key.removeprefix("model."): value for key, value in load_file(file).items()}
    head = held[f"{prefix}embed_tokens.weight"].clone()
    others = {"vision_tower.x.weight": torch.ones(2), "multi_modal_projector.y": torch.ones(1)}
    save_file({**held, **others, "language_model.lm_head.weight": head}, file)
    mine = read_back(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(mine(ids), model(ids).logits, rtol=1e-5, atol=1e-5)
