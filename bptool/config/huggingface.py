"""Hugging Face's config.json and `[model]`, both ways, for the families that bptool can build.

A family is one entry of `FAMILIES`: what its keys are called, what they mean where they are absent, and what all its
models share. Whether a family can express a model is no second list: its config is written, read back and compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from bptool.config.schema import AUTO, ModelSettings, RopeSettings
from bptool.errors import ConfigError, UsageError, nearest

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How the config.json of one `model_type` is spelled. "Our" keys are those of `[model]`.

    Attributes:
        architecture: the class that transformers builds.
        keys: our key -> its spellings, old and new; the first is the one that is written.
        defaults: our key -> what it is where config.json leaves it out or null; a key without one must be there.
        joined: our key -> the keys that must agree, as bptool has one for all of them.
        fixed: our keys that are the same in all the family's models.
        activation_key: the key of the activation's name.
        activations: name -> ours; the first name of each is the one that is written, the very first is the default.
        only: keys that change the arithmetic -> the one value that bptool can build, which is also the default.
    """

    architecture: str
    keys: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    joined: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Any]
    activation_key: str
    activations: Mapping[str, str]
    only: Mapping[str, Any] = field(default_factory=dict)


_LLAMA3_KEYS = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_context_length": "original_max_position_embeddings",
}

_ROPE_KEYS = {"theta": "rope_theta", **_LLAMA3_KEYS}

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
            "d_ff": AUTO,
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
        keys={
            "n_layers": ("num_hidden_layers",),
            "d_model": ("hidden_size",),
            "n_heads": ("num_attention_heads",),
            "n_kv_heads": ("num_key_value_heads",),
            "head_dim": ("head_dim",),
            "d_ff": ("intermediate_size",),
            "vocab_size": ("vocab_size",),
            "context_length": ("max_position_embeddings",),
            "norm_eps": ("rms_norm_eps",),
            "tied_embeddings": ("tie_word_embeddings",),
            "init_std": ("initializer_range",),
        },
        defaults={
            "n_kv_heads": AUTO,
            "head_dim": AUTO,
            "norm_eps": 1e-6,
            "tied_embeddings": False,
            "init_std": 0.02,
            "bias": False,
        },
        joined={"bias": ("attention_bias", "mlp_bias")},
        fixed={"norm": "rmsnorm", "position": "rope"},
        activation_key="hidden_act",
        activations={"silu": "swiglu", "swish": "swiglu"},
        only={"attention_dropout": 0.0},
    ),
}


def model_settings_from_huggingface(config: JsonObject, source: str) -> ModelSettings:
    """The `[model]` that a config.json describes.

    Args:
        config: the file's content.
        source: what to call the file in an error.

    Raises:
        ConfigError: the family is not known, keys are missing or wrong, or they ask for what bptool cannot build; all
            the problems at once.
    """
    name = config.get("model_type")
    known = ", ".join(FAMILIES)
    if not isinstance(name, str):
        raise ConfigError(source, [f"model_type is missing; known families are {known}"])
    if name not in FAMILIES:
        hint = nearest(name, FAMILIES)
        raise ConfigError(source, [f"model_type = '{name}' is not a known family; known are {known}{hint}"])
    return _read(FAMILIES[name], config, source)


def huggingface_config(settings: ModelSettings) -> JsonObject:
    """The config.json of a model that computes what `settings` do, for the first family that can express them.

    Dropout is a matter of training: a family without ours is written without it.

    Raises:
        UsageError: no family can; the message lists for each the keys that it has no words for.
    """
    lost: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        written = _write(name, family, settings)
        lost[name] = _lost(settings, family, written)
        if not lost[name]:
            return written
    lines = [f"  {name}: {', '.join(keys)}" for name, keys in sorted(lost.items(), key=lambda kv: len(kv[1]))]
    raise UsageError(
        "\n".join(["no Hugging Face family that bptool knows can express this model:", *lines]),
        "change the keys of one of these lines",
    )


def _read(family: Family, config: JsonObject, source: str) -> ModelSettings:
    problems = [
        f"{key} = {config[key]!r}: bptool only builds {value!r}"
        for key, value in family.only.items()
        if config.get(key) not in (None, value)
    ]
    values = {
        **family.fixed,
        **_read_keys(family, config, problems),
        **_read_joined(family, config, problems),
        **_read_activation(family, config, problems),
    }
    if family.fixed["position"] == "rope":
        values["rope"] = _read_rope(config, values.get("context_length"), problems)
    try:
        settings = ModelSettings.model_validate(values)
    except ValidationError as error:
        # Where some keys are known to be wrong, neither a rule over several nor what follows from others says more.
        told = [one for one in error.errors() if one["input"] != AUTO and (one["loc"] or not problems)]
        raise ConfigError(source, problems + [_in_their_words(family, one) for one in told]) from None
    if problems:
        raise ConfigError(source, problems)
    return settings


def _read_keys(family: Family, config: JsonObject, problems: list[str]) -> JsonObject:
    values = {}
    for ours, spellings in family.keys.items():
        found = [config[key] for key in spellings if config.get(key) is not None]
        if not found and ours not in family.defaults:
            problems.append(f"{spellings[0]} is missing")
        else:
            values[ours] = found[0] if found else family.defaults[ours]
    return values


def _read_joined(family: Family, config: JsonObject, problems: list[str]) -> JsonObject:
    values = {}
    for ours, keys in family.joined.items():
        found = [config.get(key, family.defaults[ours]) for key in keys]
        if any(value != found[0] for value in found):
            each = ", ".join(f"{key} = {value!r}" for key, value in zip(keys, found, strict=True))
            problems.append(f"{each}: these must agree, as bptool has one '{ours}' for all of them")
        values[ours] = found[0]
    return values


def _read_activation(family: Family, config: JsonObject, problems: list[str]) -> JsonObject:
    name = str(config.get(family.activation_key) or next(iter(family.activations)))
    if name in family.activations:
        return {"activation": family.activations[name]}
    known, hint = ", ".join(family.activations), nearest(name, family.activations)
    problems.append(f"{family.activation_key} = '{name}' is not known here; known are {known}{hint}")
    return {}


def _read_rope(config: JsonObject, context_length: Any, problems: list[str]) -> JsonObject:
    """`[model.rope]` from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        problems.append(f"rope_scaling = {scaling!r} must be an object or null")
        return {}
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor: bptool only rotates whole heads (1.0)")
    if kind == "default":
        return {"theta": theta}
    if kind != "llama3":
        hint = nearest(str(kind), ["default", "llama3"])
        problems.append(f"rope_type = '{kind}' is not known here; known are default, llama3{hint}")
        return {}
    given = {"original_max_position_embeddings": context_length, **scaling}
    problems += [f"rope_scaling.{key} is missing" for key in _LLAMA3_KEYS.values() if key not in given]
    scaled = {ours: given[theirs] for ours, theirs in _LLAMA3_KEYS.items() if theirs in given}
    return {"theta": theta, "scaling": "llama3", **scaled}


def _in_their_words(family: Family, error: Any) -> str:
    """One of pydantic's errors with the key's name in config.json; a rule over several keys names them itself."""
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    ours = str(error["loc"][-1])
    names = {**family.keys, **family.joined, **{key: (name,) for key, name in _ROPE_KEYS.items()}}
    return f"{names[ours][0]} = {error['input']!r}: {message}"


def _write(name: str, family: Family, settings: ModelSettings) -> JsonObject:
    config: JsonObject = {"model_type": name, "architectures": [family.architecture]}
    config |= {spellings[0]: getattr(settings, ours) for ours, spellings in family.keys.items()}
    config |= {key: getattr(settings, ours) for ours, keys in family.joined.items() for key in keys}
    names = [theirs for theirs, ours in family.activations.items() if ours == settings.activation]
    config[family.activation_key] = names[0] if names else None
    if family.fixed["position"] == "rope":
        config |= _write_rope(settings.rope)
    # Which ids begin and end a text is the tokenizer's to say; transformers' defaults are those of other vocabularies.
    return config | dict(family.only) | {"bos_token_id": None, "eos_token_id": None}


def _write_rope(rope: RopeSettings) -> JsonObject:
    """In the old spelling, which transformers 4 and 5 both read."""
    scaling = {theirs: getattr(rope, ours) for ours, theirs in _LLAMA3_KEYS.items()}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": {"rope_type": "llama3", **scaling} if rope.scaling == "llama3" else None,
    }


def _lost(settings: ModelSettings, family: Family, written: JsonObject) -> list[str]:
    """Our keys, with their values, that are not the same after a way through the family's config.json."""
    if settings.d_model % settings.n_heads:
        return [f"d_model = {settings.d_model}, which n_heads = {settings.n_heads} does not divide"]
    wanted, got = _arithmetic(settings), _arithmetic(_read(family, written, "config.json"))
    return [f"{key} = {value!r}" for key, value in wanted.items() if got[key] != value]


def _arithmetic(settings: ModelSettings) -> JsonObject:
    """The keys that the model's function depends on; how it is computed and where it begins are left out."""
    rope = settings.rope if settings.position == "rope" else RopeSettings()
    kept = rope if rope.scaling == "llama3" else RopeSettings(theta=rope.theta)
    return {**settings.model_dump(exclude={"attention", "weights", "dropout"}), "rope": kept}
