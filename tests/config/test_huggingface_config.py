from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bptool.config.huggingface import huggingface_config, model_settings_from_huggingface
from bptool.config.schema import ModelSettings, RopeSettings
from bptool.errors import ConfigError, UsageError

# As published, less the keys that have to do with generation and with other heads.
GPT2_XL: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 1600,
    "n_head": 25,
    "n_layer": 48,
    "n_positions": 1024,
    "output_past": True,
    "resid_pdrop": 0.1,
    "vocab_size": 50257,
}
LLAMA32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
SMALL_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "vocab_size": 99,
}


def read(config: dict[str, Any]) -> ModelSettings:
    return model_settings_from_huggingface(config, "config.json")


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(config)
    assert str(caught.value).startswith("config.json: ")
    return str(caught.value)


def test_gpt2_as_published() -> None:
    assert read(GPT2_XL) == ModelSettings(
        n_layers=48,
        d_model=1600,
        n_heads=25,
        n_kv_heads=25,
        head_dim=64,
        d_ff=6400,
        vocab_size=50257,
        context_length=1024,
        norm="layernorm",
        norm_eps=1e-5,
        position="learned",
        activation="gelu-tanh",
        bias=True,
        tied_embeddings=True,
        dropout=0.1,
        init_std=0.02,
    )


def test_llama_as_published() -> None:
    assert read(LLAMA32_1B) == ModelSettings(
        n_layers=16,
        d_model=2048,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        d_ff=8192,
        vocab_size=128256,
        context_length=131072,
        norm="rmsnorm",
        norm_eps=1e-5,
        position="rope",
        rope=RopeSettings(
            theta=500000.0,
            scaling="llama3",
            factor=32.0,
            low_frequency_factor=1.0,
            high_frequency_factor=4.0,
            original_context_length=8192,
        ),
        activation="swiglu",
        bias=False,
        tied_embeddings=True,
        init_std=0.02,
    )


def test_what_a_file_leaves_out_is_what_transformers_takes() -> None:
    llama = read(SMALL_LLAMA)
    assert (llama.n_kv_heads, llama.head_dim, llama.norm_eps, llama.tied_embeddings) == (6, 4, 1e-6, False)
    assert llama.rope == RopeSettings(theta=10000.0)
    assert read({**SMALL_LLAMA, "num_key_value_heads": None, "rope_scaling": None}) == llama
    gpt2 = read({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 9, "vocab_size": 3})
    assert (gpt2.d_ff, gpt2.dropout, gpt2.activation, gpt2.norm_eps) == (32, 0.1, "gelu-tanh", 1e-5)


def test_other_spellings() -> None:
    names = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    renamed = {names.get(key, key): value for key, value in GPT2_XL.items()}
    assert read(renamed) == read(GPT2_XL)
    rope = {"rope_theta": 500000.0, "type": "llama3", **LLAMA32_1B["rope_scaling"]}
    transformers5 = {k: v for k, v in LLAMA32_1B.items() if not k.startswith("rope_")} | {"rope_parameters": rope}
    assert read(transformers5) == read(LLAMA32_1B)
    old_type = {key: value for key, value in LLAMA32_1B["rope_scaling"].items() if key != "rope_type"}
    assert read({**LLAMA32_1B, "rope_scaling": {**old_type, "type": "llama3"}}) == read(LLAMA32_1B)


def test_llama3_scaling_without_its_own_length_scales_the_models() -> None:
    scaling = {key: value for key, value in LLAMA32_1B["rope_scaling"].items() if not key.startswith("original")}
    assert read({**LLAMA32_1B, "rope_scaling": scaling}).rope.original_context_length == 131072


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, ["model_type = 'lama'", "known are gpt2, llama, mistral", "did you mean 'llama'?"]),
        ({"model_type": None}, ["model_type is missing", "gpt2, llama"]),
        ({"hidden_act": "sillu"}, ["hidden_act = 'sillu'", "known are silu, swish", "did you mean 'silu'?"]),
        ({"hidden_act": ["silu"]}, ["hidden_act"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": "big"}, ["hidden_size = 'big'", "integer"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers = 0", "greater than 0"]),
        ({"hidden_size": 25}, ["25", "6", "divisible"]),
        ({"num_key_value_heads": 4}, ["6", "4", "divisible"]),
        ({"attention_dropout": 0.1}, ["attention_dropout = 0.1", "0.0"]),
        ({"attention_bias": True}, ["attention_bias = True, mlp_bias = False", "must agree"]),
        ({"attention_bias": 1, "mlp_bias": 1}, ["attention_bias = 1", "boolean"]),
        ({"rope_theta": -1.0}, ["rope_theta = -1.0", "greater than 0"]),
        (
            {"rope_scaling": {"rope_type": "yarm", "factor": 2.0}},
            ["rope_type = 'yarm'", "linear, llama3, yarn", "did you"],
        ),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, ["rope_type"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_scaling.factor is missing"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.5}}, ["attention_factor = 1.5"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, ["truncate"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}}, ["mscale_all_dim", "DeepSeek"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 40.0}}, ["beta_fast = 32.0 must exceed"]),
        ({"rope_scaling": 2.0}, ["rope_scaling = 2.0", "object"]),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["rope_scaling.low_freq_factor is missing"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        (
            {"rope_scaling": {**LLAMA32_1B["rope_scaling"], "low_freq_factor": 4.0}},
            ["high_frequency_factor", "must exceed"],
        ),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(change: dict[str, Any], words: list[str]) -> None:
    message = refusal({**SMALL_LLAMA, **change})
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "change",
    [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"add_cross_attention": True}],
)
def test_gpt2s_that_compute_something_else_are_refused(change: dict[str, bool]) -> None:
    assert next(iter(change)) in refusal({**GPT2_XL, **change})


def test_gpt2s_three_dropouts_must_be_one() -> None:
    assert "resid_pdrop = 0.0, embd_pdrop = 0.1, attn_pdrop = 0.1" in refusal({**GPT2_XL, "resid_pdrop": 0.0})


def test_all_problems_come_at_once() -> None:
    message = refusal({"model_type": "llama", "hidden_size": "x", "hidden_act": "tanh", "rope_theta": 0})
    assert "5 problems" in message
    for key in ("num_hidden_layers", "intermediate_size"):
        assert f"{key} is missing" in message
    for key in ("hidden_size = 'x'", "hidden_act = 'tanh'", "rope_theta = 0"):
        assert key in message


gpt2s = st.fixed_dictionaries(
    {
        "norm": st.just("layernorm"),
        "position": st.just("learned"),
        "bias": st.just(True),
        "activation": st.sampled_from(["gelu", "gelu-tanh", "relu"]),
        "dropout": st.sampled_from([0.0, 0.25]),
    }
)
llamas = st.fixed_dictionaries(
    {
        "norm": st.just("rmsnorm"),
        "position": st.just("rope"),
        "bias": st.booleans(),
        "n_kv_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([4, 10]),
        "rope": st.sampled_from(
            [{}, {"theta": 77.0}, {"scaling": "llama3", "factor": 3.0, "low_frequency_factor": 2.0}]
        ),
    }
)
shapes = st.fixed_dictionaries(
    {
        "n_layers": st.integers(1, 9),
        "d_model": st.sampled_from([8, 16]),
        "n_heads": st.sampled_from([2, 4]),
        "d_ff": st.integers(1, 99),
        "vocab_size": st.integers(1, 99),
        "context_length": st.integers(1, 99),
        "norm_eps": st.sampled_from([1e-5, 1e-6]),
        "tied_embeddings": st.booleans(),
        "init_std": st.sampled_from([0.02, 0.1]),
    }
)


@given(shapes, st.one_of(gpt2s, llamas))
@hypothesis_settings(max_examples=60)
def test_there_and_back(shape: dict[str, Any], style: dict[str, Any]) -> None:
    settings = ModelSettings.model_validate({**shape, **style})
    assert read(huggingface_config(settings)) == settings


def test_how_a_model_is_computed_does_not_matter() -> None:
    config = huggingface_config(ModelSettings())
    same = ModelSettings(attention="eager", weights="somewhere", dropout=0.1, rope=RopeSettings(factor=3.0))
    assert huggingface_config(same) == config


@pytest.mark.parametrize(
    ("keys", "gpt2", "llama"),
    [
        ({"qk_norm": True, "bias": True}, "qk_norm = True", "  llama: qk_norm = True"),
        ({"logit_softcap": 9.0}, "logit_softcap = 9.0", "  llama: logit_softcap = 9.0"),
        ({"sliding_window": 9, "sliding_window_pattern": 3}, "sliding_window = 9", "  llama: sliding_window = 9"),
        ({"residual": False}, "residual = False", "  llama: residual = False"),
        ({"norm": "layernorm"}, "bias = False", "  llama: norm = 'layernorm'"),
        ({"position": "none"}, "position = 'none'", "  llama: position = 'none'"),
        ({"activation": "relu"}, "norm = 'rmsnorm'", "  llama: activation = 'relu'"),
        ({"d_model": 250, "head_dim": 64}, "d_model = 250", "  llama: d_model = 250"),
    ],
)
def test_what_no_family_can_express(keys: dict[str, Any], gpt2: str, llama: str) -> None:
    with pytest.raises(UsageError) as caught:
        huggingface_config(ModelSettings.model_validate(keys))
    lines = str(caught.value).splitlines()
    assert [line for line in lines if line.startswith(llama)], lines
    assert [line for line in lines if line.startswith("  gpt2: ") and gpt2 in line], lines


def test_the_nearest_family_is_told_first() -> None:
    with pytest.raises(UsageError) as caught:
        huggingface_config(ModelSettings(norm="layernorm", position="learned", activation="gelu", n_kv_heads=2))
    lines = str(caught.value).splitlines()
    assert lines[1] == "  gpt2: n_kv_heads = 2, bias = False"
    assert lines[2].startswith("  llama: ")
