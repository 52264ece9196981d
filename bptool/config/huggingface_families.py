"""The model families whose config.json bptool reads and writes: one entry each, and no code.

The defaults are those of the family's config class in transformers, where a file leaves a key out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bptool.config.section import AUTO


@dataclass(frozen=True)
class Window:
    """How a family says which blocks have a sliding window.

    Attributes:
        default: `sliding_window` where it is left out; 0: none. Null is none in every family.
        pattern: every so many blocks is one without; 0: all have it.
        by_types: `layer_types` says which blocks have one.
        switch: a key without which there is no window; empty: none is needed.
    """

    default: int
    pattern: int = 0
    by_types: bool = False
    switch: str = ""


@dataclass(frozen=True)
class Family:
    """How the config.json of one `model_type` is spelled. "Our" keys are those of `[model]`.

    Attributes:
        architecture: the class that transformers builds.
        keys: our key -> its spellings, old and new; the first is the one that is written.
        defaults: our key -> what it is where config.json leaves it out or null; a key without one must be there.
        fixed: our keys that are the same in all the family's models.
        activation_key: the key of the activation's name.
        activations: name -> ours; the first name of each is the one that is written, the very first is the default.
        joined: our key -> the keys that must agree, as bptool has one for all of them.
        only: keys that change the arithmetic -> the one value that bptool can build, which is also the default.
        besides: their key -> the key of ours that is written there, and never read from there.
        needs: our keys that are 0 in none of the family's models.
        null_is_zero: our keys whose 0 is null in config.json, given or not.
        dense_blocks: the key of the list of those blocks that have no experts; empty: there is none.
        window: how it says which blocks have a sliding window; None: none has.
        theta: rope's base where it is left out.
        local_theta: the same in blocks with a sliding window; 0: they have none of their own.
    """

    architecture: str
    keys: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    activation_key: str
    activations: Mapping[str, str]
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    besides: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    null_is_zero: frozenset[str] = frozenset()
    dense_blocks: str = ""
    window: Window | None = None
    theta: float = 10000.0
    local_theta: float = 0.0


_SHAPE = {
    "n_layers": ("num_hidden_layers",),
    "d_model": ("hidden_size",),
    "n_heads": ("num_attention_heads",),
    "n_kv_heads": ("num_key_value_heads",),
    "d_ff": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings",),
    "norm_eps": ("rms_norm_eps",),
    "tied_embeddings": ("tie_word_embeddings",),
    "init_std": ("initializer_range",),
}
_HEAD_DIM = {"head_dim": ("head_dim",)}
_SILU = {"silu": "swiglu", "swish": "swiglu"}
_LLAMA_LIKE = {"norm": "rmsnorm", "position": "rope", "bias": False}
_GEMMA_LIKE = {"norm": "rmsnorm-offset", "position": "rope", "bias": False, "scaled_embeddings": True}
_UNBIASED = {"attention_bias": False, "attention_dropout": 0.0}
_GEMMA_ONLY = {**_UNBIASED, "use_bidirectional_attention": False}


def _defaults(n_heads: int, n_kv_heads: Any, vocab_size: int, context_length: int) -> dict[str, Any]:
    """What nearly all of transformers' config classes share.

    Their depths and widths are left out: they differ between a family's models, and a guess would be another model.
    """
    return {
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": AUTO,
        "vocab_size": vocab_size,
        "context_length": context_length,
        "norm_eps": 1e-6,
        "tied_embeddings": False,
        "init_std": 0.02,
    }


FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        keys={
            "n_layers": ("n_layer", "num_hidden_layers"),
            "d_model": ("n_embd", "hidden_size"),
            "n_heads": ("n_head", "num_attention_heads"),
            "d_ff": ("n_inner",),
            "vocab_size": ("vocab_size",),
            "context_length": ("n_positions", "max_position_embeddings", "n_ctx"),
            "norm_eps": ("layer_norm_epsilon",),
            "tied_embeddings": ("tie_word_embeddings",),
            "init_std": ("initializer_range",),
        },
        defaults={
            "n_heads": 12,
            "d_ff": AUTO,
            "vocab_size": 50257,
            "context_length": 1024,
            "norm_eps": 1e-5,
            "tied_embeddings": True,
            "init_std": 0.02,
            "dropout": 0.1,
        },
        joined={"dropout": ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
        fixed={"norm": "layernorm", "position": "learned", "bias": True},
        activation_key="activation_function",
        activations={
            "gelu_new": "gelu-tanh",
            "gelu_pytorch_tanh": "gelu-tanh",
            "gelu": "gelu",
            "relu": "relu",
        },
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=_SHAPE | _HEAD_DIM,
        defaults=_defaults(32, AUTO, 32000, 2048) | {"bias": False},
        joined={"bias": ("attention_bias", "mlp_bias")},
        fixed={"norm": "rmsnorm", "position": "rope"},
        activation_key="hidden_act",
        activations=_SILU,
        only={"attention_dropout": 0.0},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        keys=_SHAPE | _HEAD_DIM,
        defaults=_defaults(32, 8, 32000, 131072),
        fixed=_LLAMA_LIKE,
        activation_key="hidden_act",
        activations=_SILU,
        only={"attention_dropout": 0.0},
        window=Window(4096),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        keys=_SHAPE,
        defaults=_defaults(32, 32, 151936, 32768),
        fixed=_LLAMA_LIKE | {"qkv_bias": True},
        activation_key="hidden_act",
        activations=_SILU,
        only={"attention_dropout": 0.0},
        window=Window(4096, by_types=True, switch="use_sliding_window"),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        keys=_SHAPE | _HEAD_DIM,
        defaults=_defaults(32, 32, 151936, 32768) | {"head_dim": 128},
        fixed=_LLAMA_LIKE | {"qk_norm": True},
        activation_key="hidden_act",
        activations=_SILU,
        only=_UNBIASED,
        window=Window(4096, by_types=True, switch="use_sliding_window"),
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        keys=_SHAPE | _HEAD_DIM,
        defaults=_defaults(16, 16, 256000, 8192) | {"head_dim": 256, "tied_embeddings": True},
        fixed=_GEMMA_LIKE,
        # The files of the first releases say gelu and mean its approximation, with which they were trained.
        activation_key="hidden_act",
        activations={"gelu_pytorch_tanh": "geglu-tanh", "gelu": "geglu-tanh", "gelu_new": "geglu-tanh"},
        only=_GEMMA_ONLY,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        keys=_SHAPE
        | _HEAD_DIM
        | {
            "query_scale_dim": ("query_pre_attn_scalar",),
            "attention_softcap": ("attn_logit_softcapping",),
            "logit_softcap": ("final_logit_softcapping",),
        },
        defaults=_defaults(8, 4, 256000, 8192)
        | {"head_dim": 256, "tied_embeddings": True, "query_scale_dim": 256}
        | {"attention_softcap": 50.0, "logit_softcap": 30.0},
        fixed=_GEMMA_LIKE | {"post_norm": True},
        activation_key="hidden_activation",
        activations={"gelu_pytorch_tanh": "geglu-tanh", "gelu_new": "geglu-tanh"},
        only=_GEMMA_ONLY,
        null_is_zero=frozenset({"attention_softcap", "logit_softcap"}),
        window=Window(4096, pattern=2, by_types=True),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        keys=_SHAPE | _HEAD_DIM | {"query_scale_dim": ("query_pre_attn_scalar",)},
        defaults=_defaults(8, 4, 262208, 131072) | {"head_dim": 256, "tied_embeddings": True, "query_scale_dim": 256},
        fixed=_GEMMA_LIKE | {"post_norm": True, "qk_norm": True},
        activation_key="hidden_activation",
        activations={"gelu_pytorch_tanh": "geglu-tanh", "gelu_new": "geglu-tanh"},
        # Its softcaps are null in every release.
        only=_GEMMA_ONLY | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        window=Window(4096, pattern=6, by_types=True),
        theta=1000000.0,
        local_theta=10000.0,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        keys=_SHAPE
        | _HEAD_DIM
        | {
            "moe.d_expert": ("intermediate_size",),
            "moe.n_experts": ("num_local_experts", "num_experts"),
            "moe.n_active": ("num_experts_per_tok",),
            "moe.auxiliary_loss": ("router_aux_loss_coef",),
        },
        defaults=_defaults(32, 8, 32000, 131072) | {"norm_eps": 1e-5, "moe.n_active": 2, "moe.auxiliary_loss": 0.001},
        fixed=_LLAMA_LIKE,
        activation_key="hidden_act",
        activations=_SILU,
        only={"attention_dropout": 0.0, "router_jitter_noise": 0.0},
        needs=("moe.n_experts",),
        window=Window(0),
        theta=1000000.0,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        keys=_SHAPE
        | _HEAD_DIM
        | {
            "moe.d_expert": ("moe_intermediate_size",),
            "moe.n_experts": ("num_experts", "num_local_experts"),
            "moe.n_active": ("num_experts_per_tok",),
            "moe.normalized": ("norm_topk_prob",),
            "moe.auxiliary_loss": ("router_aux_loss_coef",),
        },
        defaults=_defaults(32, 4, 151936, 32768)
        | {"moe.n_active": 8, "moe.normalized": False}
        | {"moe.auxiliary_loss": 0.001},
        fixed=_LLAMA_LIKE | {"qk_norm": True},
        activation_key="hidden_act",
        activations=_SILU,
        only=_UNBIASED | {"decoder_sparse_step": 1},
        needs=("moe.n_experts",),
        dense_blocks="mlp_only_layers",
        window=Window(4096, switch="use_sliding_window"),
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        # Latent attention has as many heads of each kind, whatever the file says.
        keys={ours: theirs for ours, theirs in _SHAPE.items() if ours != "n_kv_heads"}
        | {
            "mla.q_rank": ("q_lora_rank",),
            "mla.kv_rank": ("kv_lora_rank",),
            "mla.nope_dim": ("qk_nope_head_dim",),
            "mla.rope_dim": ("qk_rope_head_dim",),
            "mla.value_dim": ("v_head_dim",),
            "moe.d_expert": ("moe_intermediate_size",),
            "moe.n_experts": ("n_routed_experts", "num_local_experts"),
            "moe.n_active": ("num_experts_per_tok",),
            "moe.n_shared": ("n_shared_experts",),
            "moe.n_dense_layers": ("first_k_dense_replace",),
            "moe.normalized": ("norm_topk_prob",),
            "moe.weight_scale": ("routed_scaling_factor",),
            "moe.n_groups": ("n_group",),
            "moe.n_active_groups": ("topk_group",),
            "moe.auxiliary_loss": ("aux_loss_alpha", "router_aux_loss_coef"),
        },
        defaults=_defaults(128, AUTO, 129280, 4096)
        | {"mla.q_rank": 1536, "mla.kv_rank": 512, "mla.nope_dim": 128, "mla.rope_dim": 64, "mla.value_dim": 128}
        | {"moe.n_active": 8, "moe.n_shared": 1, "moe.n_dense_layers": 3}
        | {"moe.normalized": True, "moe.weight_scale": 2.5, "moe.n_groups": 8, "moe.n_active_groups": 4}
        | {"moe.auxiliary_loss": 0.001},
        fixed=_LLAMA_LIKE | {"moe.router": "sigmoid"},
        activation_key="hidden_act",
        activations=_SILU,
        only=_UNBIASED
        | {"rope_interleave": True, "moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        besides={"num_key_value_heads": "n_heads"},
        needs=("mla.kv_rank", "moe.n_experts", "moe.n_shared"),
        null_is_zero=frozenset({"mla.q_rank"}),
    ),
}

PARTS: Mapping[str, str] = {"gemma3": "gemma3_text"}
"""Models of several parts -> the family of the one below `text_config`, which is what bptool reads."""
