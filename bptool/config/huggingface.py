"""Hugging Face's config.json and `[model]`, both ways, for the families that bptool can build.

A family is one entry of `FAMILIES`: what its keys are called, what they mean where they are absent, and what all its
models share. Whether a family can express a model is no second list: its config is written, read back and compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import ValidationError

from bptool.config.huggingface_defaults import defaults_taken, value_at
from bptool.config.huggingface_families import FAMILIES, PARTS, Family
from bptool.config.huggingface_rope import ROPE_KEYS, read_rope, used_keys, write_rope
from bptool.config.huggingface_window import read_window, write_window
from bptool.config.keys import flatten, nest
from bptool.config.schema import AUTO, MlaSettings, ModelSettings, MoeSettings, RopeSettings, Section
from bptool.errors import ConfigError, UsageError, nearest

__all__ = ["FAMILIES", "Reading", "huggingface_config", "model_settings_from_huggingface", "read_huggingface"]

JsonObject = dict[str, Any]


class Reading(NamedTuple):
    """What a config.json says, and what had to be taken where it says nothing."""

    settings: ModelSettings
    defaults: dict[str, str]
    """Keys of `[model]` that the file leaves out -> its own key with the family's default: `rope_theta = 10000.0`."""


def model_settings_from_huggingface(config: JsonObject, source: str) -> ModelSettings:
    """The same without what it was read from."""
    return read_huggingface(config, source).settings


def read_huggingface(config: JsonObject, source: str) -> Reading:
    """The `[model]` that a config.json describes.

    Args:
        config: the file's content.
        source: what to call the file in an error.

    Raises:
        ConfigError: the family is not known, keys are missing or wrong, or they ask for what bptool cannot build; all
            the problems at once.
    """
    name = config.get("model_type")
    names = [*FAMILIES, *PARTS]
    known = ", ".join(names)
    if not isinstance(name, str):
        raise ConfigError(source, [f"model_type is missing; known families are {known}"])
    if name not in names:
        hint = nearest(name, names)
        raise ConfigError(source, [f"model_type = '{name}' is not a known family; known are {known}{hint}"])
    family = FAMILIES[PARTS.get(name, name)]
    if name in PARTS:
        config = _text_part(config, source)
    settings = _read(family, config, source)
    return Reading(settings, defaults_taken(family, config, settings))


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


def _text_part(config: JsonObject, source: str) -> JsonObject:
    """The language model of a model that also sees; what it shares with the other parts may stand outside."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(source, [f"text_config = {text!r} must be an object: the language model's own keys"])
    outside = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**outside, **text}


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
    values |= _read_dense_blocks(family, config, problems)
    values |= read_window(family.window, config, values.get("n_layers"), problems)
    if family.fixed["position"] == "rope":
        values["rope"] = read_rope(family, config, values.get("context_length"), problems)
    try:
        settings = ModelSettings.model_validate(nest(values))
    except ValidationError as error:
        # Where some keys are known to be wrong, neither a rule over several nor what follows from others says more.
        told = [one for one in error.errors() if one["input"] != AUTO and (one["loc"] or not problems)]
        remedy = _write_out(family, config) if any(one["type"] == "value_error" for one in told) else ""
        raise ConfigError(source, problems + [_in_their_words(family, one) for one in told], remedy) from None
    if problems:
        raise ConfigError(source, problems)
    return settings


def _write_out(family: Family, config: JsonObject) -> str:
    """What to do where keys contradict each other, of which some were not written."""
    taken = [
        f"{spellings[0]} = {family.defaults[ours]}"
        for ours, spellings in family.keys.items()
        if family.defaults.get(ours, AUTO) != AUTO and not any(key in config for key in spellings)
    ]
    return f"the file leaves these out, and the family's defaults were taken: {', '.join(taken)}" if taken else ""


def _read_keys(family: Family, config: JsonObject, problems: list[str]) -> JsonObject:
    values = {}
    for ours, spellings in family.keys.items():
        found = [config[key] for key in spellings if config.get(key) is not None]
        if not found and ours in family.null_is_zero and any(key in config for key in spellings):
            values[ours] = 0
        elif not found and ours not in family.defaults:
            missing = f"{spellings[0]} is missing, and no default is taken for it: the family's models differ in it"
            problems += [missing] if missing not in problems else []  # one key of theirs may be two of ours
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


def _read_dense_blocks(family: Family, config: JsonObject, problems: list[str]) -> JsonObject:
    found = config.get(family.dense_blocks) or []
    if isinstance(found, list) and found == list(range(len(found))):
        return {"moe.n_dense_layers": len(found)} if family.dense_blocks else {}
    problems.append(f"{family.dense_blocks} = {found!r}: bptool only builds blocks without experts before all others")
    return {}


def _in_their_words(family: Family, error: Any) -> str:
    """One of pydantic's errors with the key's name in config.json; a rule over several keys names them itself."""
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    ours = ".".join(str(part) for part in error["loc"])
    names = {**family.keys, **family.joined, "sliding_window": ("sliding_window",)}
    names |= {f"rope.{key}": (name,) for key, name in ROPE_KEYS.items()}
    return f"{names[ours][0]} = {error['input']!r}: {message}"


def _write(name: str, family: Family, settings: ModelSettings) -> JsonObject:
    config: JsonObject = {"model_type": name, "architectures": [family.architecture]}
    for ours, spellings in family.keys.items():
        value = value_at(settings, ours)
        config[spellings[0]] = None if ours in family.null_is_zero and not value else value
    config |= {key: value_at(settings, ours) for ours, keys in family.joined.items() for key in keys}
    config |= {key: value_at(settings, ours) for key, ours in family.besides.items()}
    names = [theirs for theirs, ours in family.activations.items() if ours == settings.activation]
    config[family.activation_key] = names[0] if names else None
    if family.dense_blocks:
        config[family.dense_blocks] = list(range(settings.moe.n_dense_layers))
    config |= write_window(family.window, settings)
    if family.fixed["position"] == "rope":
        config |= write_rope(family, settings.rope)
    # Which ids begin, end and fill a text is the tokenizer's to say; transformers' defaults are of other vocabularies.
    return config | dict(family.only) | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _lost(settings: ModelSettings, family: Family, written: JsonObject) -> list[str]:
    """Our keys, with their values, that are not the same after a way through the family's config.json."""
    if settings.d_model % settings.n_heads:
        return [f"d_model = {settings.d_model}, which n_heads = {settings.n_heads} does not divide"]
    without = [f"{key} = 0" for key in family.needs if not value_at(settings, key)]
    try:
        got = _arithmetic(_read(family, written, "config.json"))
    except ConfigError as error:
        return [*without, *error.problems]
    wanted = _arithmetic(settings)
    return without + [f"{key} = {value!r}" for key, value in wanted.items() if got[key] != value]


def _arithmetic(settings: ModelSettings) -> JsonObject:
    """The keys that the model's function depends on; how it is computed and where it begins are left out."""
    experts = [settings.has_experts(block) for block in range(settings.n_layers)]
    slides = [settings.slides(block) for block in range(settings.n_layers)]
    windowed = any(slides) and settings.sliding_window < settings.context_length
    rope = used_keys(settings.rope) if settings.position == "rope" else RopeSettings()
    if not windowed or (rope.local_theta == rope.theta and rope.scaling == "none"):
        rope = rope.model_copy(update={"local_theta": 0.0})
    same: JsonObject = {
        "moe": settings.moe.model_copy(update={"auxiliary_loss": 0.0}) if any(experts) else MoeSettings(),
        "mla": settings.mla if settings.mla.kv_rank else MlaSettings(),
        "d_ff": 0 if all(experts) else settings.d_ff,
        "sliding_window": settings.sliding_window if windowed else 0,
        "sliding_window_pattern": 0 if all(slides) or not windowed else settings.sliding_window_pattern,
        "qkv_bias": settings.qkv_bias and not settings.bias,
        "rope": rope,
    }
    sections = {key: value.model_dump() for key, value in same.items() if isinstance(value, Section)}
    return flatten({**settings.model_dump(exclude={"attention", "weights", "dropout"}), **same, **sections})
