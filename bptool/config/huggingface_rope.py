"""`[model.rope]` in config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bptool.config.huggingface_families import Family
from bptool.config.model_schema import RopeSettings
from bptool.errors import nearest

JsonObject = dict[str, Any]

# Our key -> theirs, for each scaling; those with a default here may be left out.
_SCALINGS: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_context_length": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}

ROPE_KEYS: Mapping[str, str] = {
    "theta": "rope_theta",
    "local_theta": "rope_local_base_freq",
    **{ours: theirs for keys in _SCALINGS.values() for ours, theirs in keys.items()},
}
"""Our keys of `[model.rope]` -> theirs."""


def read_rope(family: Family, config: JsonObject, context_length: Any, problems: list[str]) -> JsonObject:
    """`[model.rope]` of a config.json; what is wrong is added to `problems`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        problems.append(f"rope_scaling = {given!r} must be an object or null")
        return {}
    near: JsonObject = {}
    if {"full_attention", "sliding_attention"} & given.keys():
        near, given = (given.get(kind) or {} for kind in ("sliding_attention", "full_attention"))
        if not (isinstance(near, dict) and isinstance(given, dict)):
            problems.append("rope_parameters: full_attention and sliding_attention must be objects")
            return {}
    found = _read_one(family, config, given, context_length, problems)
    if family.local_theta:
        found["local_theta"] = near.get("rope_theta", config.get("rope_local_base_freq", family.local_theta))
    elif near not in ({}, given):
        problems.append("rope_parameters: this family has one rope for all its blocks")
    if near.get("rope_type", "default") != "default" and family.local_theta:
        problems.append("rope_parameters.sliding_attention: bptool stretches no wavelengths there ('default')")
    return found


def write_rope(family: Family, rope: RopeSettings) -> JsonObject:
    """In the old spelling, which transformers 4 and 5 both read."""
    scaling = None
    if rope.scaling != "none":
        keys = {theirs: getattr(rope, ours) for ours, theirs in _SCALINGS[rope.scaling].items()}
        scaling = {"rope_type": rope.scaling, **keys}
    local = {"rope_local_base_freq": rope.local_theta or rope.theta} if family.local_theta else {}
    return {"rope_theta": rope.theta, "rope_scaling": scaling, **local}


def used_keys(rope: RopeSettings) -> RopeSettings:
    """The same rope, with the keys that its scaling does not read at their defaults."""
    read = {ours: getattr(rope, ours) for ours in _SCALINGS.get(rope.scaling, ())}
    return RopeSettings(theta=rope.theta, local_theta=rope.local_theta, scaling=rope.scaling, **read)


def _read_one(
    family: Family, config: JsonObject, given: JsonObject, context_length: Any, problems: list[str]
) -> JsonObject:
    theta = given.get("rope_theta", config.get("rope_theta", family.theta))
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor: bptool only rotates whole heads (1.0)")
    if kind == "default":
        return {"theta": theta}
    if not isinstance(kind, str) or kind not in _SCALINGS:
        hint = nearest(str(kind), ["default", *_SCALINGS])
        problems.append(f"rope_type = '{kind}' is not known here; known are default, {', '.join(_SCALINGS)}{hint}")
        return {}
    given = {"original_max_position_embeddings": context_length, **given}
    if kind == "yarn":
        given = _yarn(family, given, problems)
    keys = _SCALINGS[kind]
    problems += [f"rope_scaling.{key} is missing" for key in keys.values() if given.get(key) is None]
    scaled = {ours: given[theirs] for ours, theirs in keys.items() if given.get(theirs) is not None}
    return {"theta": theta, "scaling": kind, **scaled}


def _yarn(family: Family, given: JsonObject, problems: list[str]) -> JsonObject:
    """YaRN's keys with what transformers takes where they are left out; those that bptool lacks are told."""
    given = {**_YARN_DEFAULTS, **{key: value for key, value in given.items() if value is not None}}
    if "attention_factor" in given:
        problems.append(f"rope_scaling.attention_factor = {given['attention_factor']!r}: bptool derives it from mscale")
    if not given.get("truncate", True):
        problems.append("rope_scaling.truncate = False: bptool only builds True")
    if given["mscale_all_dim"] and "mla.kv_rank" not in family.keys:
        problems.append("rope_scaling.mscale_all_dim: only DeepSeek's attention is scaled by it")
    if not given["mscale_all_dim"]:
        given["mscale"] = 1.0  # as transformers does: one without the other says nothing
    return given
