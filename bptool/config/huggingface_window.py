"""Sliding windows in config.json: how wide, and in which blocks."""

from __future__ import annotations

from typing import Any

from bptool.config.huggingface_families import Window
from bptool.config.model_schema import ModelSettings

JsonObject = dict[str, Any]

_NEAR, _FAR = "sliding_attention", "full_attention"


def read_window(window: Window | None, config: JsonObject, n_layers: Any, problems: list[str]) -> JsonObject:
    """`sliding_window` and `sliding_window_pattern` of a config.json; what is wrong is added to `problems`."""
    if window is None or (window.switch and not config.get(window.switch)):
        return {}
    width = config.get("sliding_window", window.default) or 0
    if not window.by_types or type(n_layers) is not int or n_layers < 1:
        return {"sliding_window": width, "sliding_window_pattern": window.pattern}
    pattern = _whole(config.get("sliding_window_pattern", config.get("_sliding_window_pattern")), window.pattern)
    types = config.get("layer_types") or _types_without(config, n_layers, pattern)
    if types == [_FAR] * n_layers:
        return {"sliding_window": 0}
    first = types.index(_FAR) + 1 if isinstance(types, list) and _FAR in types else 0
    for candidate in (pattern, first):
        if types == _types(n_layers, candidate):
            return {"sliding_window": width, "sliding_window_pattern": candidate}
    problems.append(
        "layer_types: bptool only builds a sliding window in every block, or in every block but each n-th"
        " (or max_window_layers = 0)"
    )
    return {}


def write_window(window: Window | None, settings: ModelSettings) -> JsonObject:
    """The keys of the family's config.json."""
    if window is None:
        return {}
    width = settings.sliding_window
    written: JsonObject = {"sliding_window": width or None}
    if window.switch:
        written[window.switch] = width > 0
    if window.by_types:
        # A width where no block has one: transformers makes the mask all the same.
        written["sliding_window"] = width or window.default
        written["layer_types"] = [_NEAR if settings.slides(i) else _FAR for i in range(settings.n_layers)]
    return written


def _types_without(config: JsonObject, n_layers: int, pattern: int) -> list[str]:
    """What transformers takes for `layer_types`: Qwen's windows begin at a block, Gemma's come in turns."""
    if pattern:
        return _types(n_layers, pattern)
    first = _whole(config.get("max_window_layers"), 28)
    return [_FAR if number < first else _NEAR for number in range(n_layers)]


def _whole(value: Any, default: int) -> int:
    """The value where it is a number that can be counted to."""
    return value if type(value) is int and value >= 0 else default


def _types(n_layers: int, pattern: int) -> list[str]:
    """Every `pattern`-th block sees everything; with 0 none does."""
    return [_FAR if pattern and (number + 1) % pattern == 0 else _NEAR for number in range(n_layers)]
