"""What bptool reads from the config.json files of each family, published ones and those of transformers' classes."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import Any

import pytest
import torch

from bptool.config.huggingface import FAMILIES, huggingface_config, model_settings_from_huggingface, read_huggingface
from bptool.config.schema import ModelSettings
from bptool.errors import ConfigError
from bptool.model.accounting import count_parameters

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

# As published, less the keys that have to do with generation, with other parts and with how they were saved.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral-7b-v0.1": {
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "qwen2-7b": {
        "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 3584,
        "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 131072,
        "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 152064,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
        "max_position_embeddings": 40960, "max_window_layers": 36, "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma-7b": {
        "model_type": "gemma", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 256,
        "hidden_act": "gelu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 24576,
        "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
    "gemma-2-9b": {
        "model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "vocab_size": 256000,
    },
    # A model that also sees: its text part says only where it differs from transformers' class.
    "gemma-3-4b": {
        "model_type": "gemma3", "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 129280,
    },
}  # fmt: skip
PARAMETERS = {
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gemma-7b": 8_537_680_896,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-1b": 999_885_952,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v3": 671_026_419_200,
}


def read(config: dict[str, Any]) -> ModelSettings:
    return model_settings_from_huggingface(config, "config.json")


def theirs(config: dict[str, Any]) -> Any:
    """The config of transformers that a config.json makes; the language model's, where there are several parts."""
    found = transformers.AutoConfig.for_model(**config)
    return getattr(found, "text_config", found)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_of_transformers(name: str) -> None:
    settings = read(PUBLISHED[name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs(PUBLISHED[name]))
    # DeepSeek counts the experts' corrections among the parameters, transformers among the buffers.
    corrections = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert count_parameters(settings).total == model.num_parameters() + corrections == PARAMETERS[name]


@pytest.mark.parametrize(("name", "billions"), [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3), ("deepseek-v3", 37)])
def test_active_parameters_are_those_that_are_published(name: str, billions: float) -> None:
    """Which are rounded down, Mixtral's excepted."""
    assert count_parameters(read(PUBLISHED[name])).active / 1e9 == pytest.approx(billions, rel=0.02)


def test_all_parameters_are_active_without_experts() -> None:
    parts = count_parameters(read(PUBLISHED["qwen3-8b"]))
    assert parts.active == parts.total


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_survive_transformers_own_spelling(name: str) -> None:
    """What transformers 5 writes for the same model: `rope_parameters`, `layer_types`, every key there is."""
    assert read(theirs(PUBLISHED[name]).to_dict()) == read(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_come_back(name: str) -> None:
    settings = read(PUBLISHED[name])
    written = huggingface_config(settings)
    again = read(written)
    assert again == settings.model_copy(update={"sliding_window_pattern": again.sliding_window_pattern})
    assert theirs(written).model_type == written["model_type"]


NEW = [name for name in FAMILIES if name != "gpt2"]


WIDTHS = ("num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def least(name: str) -> dict[str, Any]:
    """What transformers' class writes, but for all that may be left out."""
    config = transformers.AutoConfig.for_model(name).to_dict()
    return {key: value for key, value in config.items() if key in ("model_type", *WIDTHS, *EXPERTS)}


@pytest.mark.parametrize("name", NEW)
def test_what_a_file_leaves_out_is_what_transformers_takes(name: str) -> None:
    config = transformers.AutoConfig.for_model(name).to_dict()
    assert read(least(name)) == read(config)


def test_what_a_file_of_gpt2_leaves_out_is_what_transformers_takes() -> None:
    widths = {"model_type": "gpt2", "n_layer": 2, "n_embd": 96}
    assert read(widths) == read({**transformers.GPT2Config().to_dict(), **widths})
    told = read_huggingface(widths, "").defaults
    assert {told["n_heads"], told["vocab_size"], told["context_length"]} == {
        "n_head = 12",
        "vocab_size = 50257",
        "n_positions = 1024",
    }


@pytest.mark.parametrize("name", NEW)
def test_depth_and_widths_are_never_guessed(name: str) -> None:
    wanted = least(name)
    with pytest.raises(ConfigError) as caught:
        read({"model_type": name})
    missing = {problem.partition(" is missing, and no default is taken")[0] for problem in caught.value.problems}
    # Experts have two spellings, of which the family's own is named.
    assert {key for key in missing if "expert" not in key} == {key for key in wanted if key in WIDTHS}
    assert len(missing & {*EXPERTS}) == ("moe.n_experts" in FAMILIES[name].keys)


@pytest.mark.parametrize("name", [name for name in NEW if not FAMILIES[name].joined])
def test_what_is_taken_is_told_as_transformers_has_it(name: str) -> None:
    """One key after another: a file that says it all leaves nothing to tell, and one that doesn't leaves that."""
    config = transformers.AutoConfig.for_model(name).to_dict()
    ropes = config.pop("rope_parameters")
    full = {**config, "rope_theta": ropes.get("full_attention", ropes)["rope_theta"], "rope_local_base_freq": 10000.0}
    # Neither is every class's attribute.
    full["head_dim"] = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    full |= {"tie_word_embeddings": FAMILIES[name].defaults["tied_embeddings"]}
    full |= {"aux_loss_alpha" if name == "deepseek_v3" else "router_aux_loss_coef": 0.001}
    assert read_huggingface(full, "").defaults == {}
    told = read_huggingface(least(name), "").defaults
    for words in told.values():
        key, _, value = words.partition(" = ")
        assert value == str(full[key]).lower() if key in full else key == "sliding_window_pattern", words
        one = {**full, key: None} if key not in ("attn_logit_softcapping", "final_logit_softcapping") else dict(full)
        one.pop(key)
        if key in full:
            assert [*read_huggingface(one, "").defaults.values()] == [words]
    assert {"n_heads", "vocab_size", "context_length", "norm_eps", "rope.theta", "activation"} <= told.keys()


def test_a_contradiction_names_the_defaults_that_nobody_wrote() -> None:
    config = {**least("mistral"), "hidden_size": 64, "num_attention_heads": 4, "head_dim": None, "rms_norm_eps": 1e-5}
    with pytest.raises(ConfigError) as caught:
        read(config)
    assert "num_key_value_heads = 8" in caught.value.remedy
    assert "num_attention_heads" not in caught.value.remedy
    assert "rms_norm_eps" not in caught.value.remedy


def test_a_null_that_is_a_value_is_not_told() -> None:
    config = {**least("gemma2"), "final_logit_softcapping": None}
    assert "attention_softcap" in read_huggingface(config, "").defaults
    assert "logit_softcap" not in read_huggingface(config, "").defaults


def test_of_published_files_only_what_they_leave_out_is_told() -> None:
    def told(name: str) -> str:
        return ", ".join(read_huggingface(PUBLISHED[name], "").defaults.values())

    assert told("qwen3-8b") == ""
    assert told("mixtral-8x7b") == "head_dim = 128"
    assert told("gemma-7b") == "tie_word_embeddings = true"
    gemma3 = told("gemma-3-4b")
    assert gemma3.startswith("num_attention_heads = 8, num_key_value_heads = 4, vocab_size = 262208")
    assert "max_position_embeddings = 131072" in gemma3
    assert "rope_local_base_freq = 10000.0" in gemma3
    assert "hidden_size" not in gemma3
    assert "sliding_window =" not in gemma3


def test_windows_and_ropes() -> None:
    mistral, gemma2, gemma3 = (read(PUBLISHED[name]) for name in ("mistral-7b-v0.1", "gemma-2-9b", "gemma-3-4b"))
    assert (mistral.sliding_window, mistral.sliding_window_pattern) == (4096, 0)
    assert (gemma2.sliding_window, gemma2.sliding_window_pattern) == (4096, 2)
    assert [gemma2.slides(i) for i in range(4)] == [True, False, True, False]
    assert (gemma3.sliding_window, gemma3.sliding_window_pattern) == (1024, 6)
    assert [i for i in range(34) if not gemma3.slides(i)] == [5, 11, 17, 23, 29]
    assert (gemma3.rope.theta, gemma3.rope.local_theta) == (1e6, 1e4)
    assert (gemma3.rope.scaling, gemma3.rope.factor) == ("linear", 8.0)
    assert (gemma3.n_heads, gemma3.vocab_size, gemma3.qk_norm, gemma3.post_norm) == (8, 262208, True, True)
    assert read(PUBLISHED["qwen2-7b"]).sliding_window == 0
    assert read({**PUBLISHED["mistral-7b-v0.1"], "sliding_window": None}).sliding_window == 0


SMALL = {
    **{"num_hidden_layers": 4, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2},
    **{"intermediate_size": 64, "moe_intermediate_size": 16},
    **{"num_local_experts": 8, "num_experts": 128, "n_routed_experts": 256},
}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, ["layer_types", "every block"]),
        ({"model_type": "gemma2", "layer_types": ["full_attention"] * 3}, ["layer_types"]),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, ["hidden_activation = 'gelu'"]),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1.0}, ["attn_logit_softcapping = -1.0", "0"]),
        ({"model_type": "gemma3"}, ["text_config = None must be an object"]),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, ["use_bidirectional_attention = True"]),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, ["final_logit_softcapping = 30.0"]),
        ({"model_type": "qwen3", "attention_bias": True}, ["attention_bias = True", "False"]),
        ({"model_type": "mistral", "sliding_window": -3}, ["sliding_window = -3"]),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, ["decoder_sparse_step = 2", "1"]),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, ["mlp_only_layers = [1]", "before all others"]),
        ({"model_type": "qwen3_moe", "num_experts": "x"}, ["num_experts = 'x'", "integer"]),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, ["n_active = 9", "8 experts"]),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, ["rope_interleave = False", "True"]),
        ({"model_type": "deepseek_v3", "topk_method": "greedy"}, ["topk_method = 'greedy'"]),
        ({"model_type": "deepseek_v3", "q_lora_rank": "x"}, ["q_lora_rank = 'x'", "integer"]),
        ({"model_type": "deepseek_v3", "qk_rope_head_dim": 5}, ["rope_dim = 5 is odd"]),
        ({"model_type": "qwen3", "head_dim": 5}, ["head_dim = 5 is odd"]),
        ({"model_type": "gemma4"}, ["model_type = 'gemma4' is not a known family", "gemma3_text", "did you mean"]),
        (
            {
                "model_type": "qwen3",
                "rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 3.0}},
            },
            ["one rope for all"],
        ),
    ],
)
def test_refusals(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read({**SMALL, **config})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_experts() -> None:
    mixtral, qwen = read(PUBLISHED["mixtral-8x7b"]).moe, read(PUBLISHED["qwen3-30b-a3b"]).moe
    assert (mixtral.n_experts, mixtral.n_active, mixtral.d_expert, mixtral.auxiliary_loss) == (8, 2, 14336, 0.02)
    assert (qwen.n_experts, qwen.n_active, qwen.d_expert, qwen.normalized) == (128, 8, 768, True)
    other = {key.replace("num_local_", "num_"): value for key, value in PUBLISHED["mixtral-8x7b"].items()}
    assert read(other).moe == mixtral
    other = {key.replace("num_exp", "num_local_exp"): value for key, value in PUBLISHED["qwen3-30b-a3b"].items()}
    assert read({**other, "num_experts_per_tok": 8}).moe == qwen
    assert read({**PUBLISHED["qwen3-30b-a3b"], "mlp_only_layers": [0, 1]}).moe.n_dense_layers == 2


def test_latent_attention() -> None:
    settings = read(PUBLISHED["deepseek-v3"])
    mla, moe, rope = settings.mla, settings.moe, settings.rope
    assert (mla.q_rank, mla.kv_rank, mla.nope_dim, mla.rope_dim, mla.value_dim) == (1536, 512, 128, 64, 128)
    assert (settings.head_dim, settings.rotary_dim, settings.value_dim, settings.query_scale_dim) == (192, 64, 128, 192)
    assert (moe.n_experts, moe.n_groups, moe.n_active_groups, moe.n_active, moe.n_shared) == (256, 8, 4, 8, 1)
    assert (moe.n_dense_layers, moe.weight_scale, moe.router, moe.auxiliary_loss) == (3, 2.5, "sigmoid", 0.001)
    assert (rope.scaling, rope.factor, rope.mscale, rope.mscale_all_dim) == ("yarn", 40, 1.0, 1.0)
    assert read({**PUBLISHED["deepseek-v3"], "q_lora_rank": None}).mla.q_rank == 0
    assert read({**PUBLISHED["deepseek-v3"], "num_key_value_heads": 3}) == settings  # it has no such heads
    assert huggingface_config(settings)["num_key_value_heads"] == 128


def test_windows_that_begin_beyond_the_last_block_are_none() -> None:
    assert read({**SMALL, "model_type": "qwen2", "use_sliding_window": True}).sliding_window == 0


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        ({}, "llama"),
        (
            {
                "mla": {"kv_rank": 8},
                "moe": {"n_experts": 4, "router": "sigmoid", "n_shared": 1, "auxiliary_loss": 0.001},
            },
            "deepseek_v3",
        ),
        ({"moe": {"n_experts": 4, "auxiliary_loss": 0.0}}, "mixtral"),
        ({"moe": {"n_experts": 4, "n_dense_layers": 99}}, "llama"),
        ({"moe": {"n_experts": 4}, "qk_norm": True, "d_ff": 99}, "qwen3_moe"),
        ({"sliding_window": 9}, "mistral"),
        ({"sliding_window": 9, "sliding_window_pattern": 2, "qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "sliding_window": 999}, "qwen3"),
        ({"norm": "rmsnorm-offset", "activation": "geglu-tanh", "scaled_embeddings": True}, "gemma"),
        (
            {"norm": "rmsnorm-offset", "activation": "geglu-tanh", "scaled_embeddings": True, "post_norm": True},
            "gemma2",
        ),
    ],
)
def test_the_plainest_family_that_computes_the_same_is_written(keys: dict[str, Any], family: str) -> None:
    settings = ModelSettings.model_validate(keys)
    written = huggingface_config(settings)
    assert written["model_type"] == family
    again = read(written)
    assert huggingface_config(again) == written


@pytest.mark.parametrize("name", FAMILIES)
def test_no_value_brings_it_down(name: str) -> None:
    """Each key with values that make no sense there: a model, or one error that tells what is wrong."""
    config = transformers.AutoConfig.for_model(name).to_dict() | {"use_sliding_window": True, "rope_scaling": None}
    config |= {"sliding_window_pattern": 3, "mlp_only_layers": [], "max_window_layers": 1}
    older = {key: value for key, value in config.items() if key not in ("layer_types", "rope_parameters")}
    values = ["x", -1, ["a"], 3.5, True, 10**5, {"sliding_attention": "x"}, {"rope_type": "yarn", "factor": "x"}]
    for spelling in (config, older):
        for key in spelling.keys() - {"model_type"}:
            for value in values:
                with contextlib.suppress(ConfigError):
                    assert isinstance(read({**spelling, key: value}), ModelSettings)
