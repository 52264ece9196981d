"""What a config.json leaves out, and what was taken for it: to be told, as nobody typed it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

from bptool.config.huggingface_families import Family
from bptool.config.model_schema import ModelSettings

JsonObject = Mapping[str, Any]


def defaults_taken(family: Family, config: JsonObject, settings: ModelSettings) -> dict[str, str]:
    """Our keys that the file says nothing of -> its own key with the value that was taken.

    A null is nothing said, but where it is a value of its own.

    Args:
        settings: what was read from `config`; values that follow from others are told as they came out.
    """
    return dict(_taken(family, config, settings))


def value_at(settings: ModelSettings, dotted: str) -> Any:
    """The value of one of our keys."""
    return reduce(getattr, dotted.split("."), settings)


def _taken(family: Family, config: JsonObject, settings: ModelSettings) -> Iterator[tuple[str, str]]:
    for ours, spellings in family.keys.items():
        null = ours in family.null_is_zero and any(key in config for key in spellings)
        if not null and _silent(config, *spellings):
            yield ours, f"{spellings[0]} = {_shown(value_at(settings, ours))}"
    for ours, keys in family.joined.items():
        if any(key not in config for key in keys):
            absent = (key for key in keys if key not in config)
            yield ours, ", ".join(f"{key} = {_shown(family.defaults[ours])}" for key in absent)
    if not config.get(family.activation_key):
        yield "activation", f"{family.activation_key} = {_shown(next(iter(family.activations)))}"
    if family.fixed["position"] == "rope":
        yield from _of_rope(family, config, settings)
    if family.window and settings.sliding_window:
        yield from _of_window(config, settings, by_types=family.window.by_types)


def _of_rope(family: Family, config: JsonObject, settings: ModelSettings) -> Iterator[tuple[str, str]]:
    """The bases of the angles; one object holds them, or one of each kind of block, or neither does."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    far, near = (given.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    if "rope_theta" not in {**config, **given, **far}:
        yield "rope.theta", f"rope_theta = {_shown(settings.rope.theta)}"
    if family.local_theta and "rope_local_base_freq" not in config and "rope_theta" not in near:
        yield "rope.local_theta", f"rope_local_base_freq = {_shown(settings.rope.local_theta)}"


def _of_window(config: JsonObject, settings: ModelSettings, *, by_types: bool) -> Iterator[tuple[str, str]]:
    if "sliding_window" not in config:
        yield "sliding_window", f"sliding_window = {settings.sliding_window}"
    if by_types and _silent(config, "layer_types", "sliding_window_pattern", "_sliding_window_pattern"):
        yield "sliding_window_pattern", f"sliding_window_pattern = {settings.sliding_window_pattern}"


def _silent(config: JsonObject, *keys: str) -> bool:
    return all(config.get(key) is None for key in keys)


def _shown(value: Any) -> str:
    """As a config.json would say it."""
    return str(value).lower() if isinstance(value, bool) else f"{value}"
