"""The built-in transformer's config, made as small as float64 and differences can afford; what was cut is said."""

from __future__ import annotations

from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.model.accounting import count_parameters

MOST_PARAMETERS = 4_000_000
MOST_TOKENS = 64
MOST_SEQUENCES = 2
_NARROWEST = 32

Changes = dict[str, object]


def shrunk(config: Config) -> tuple[Config, list[str]]:
    """The config of a like model that is small enough, and a sentence for each key that was cut.

    Sequences and their number are cut first; then, while the model has too many parameters, the vocabulary, the blocks
    (to two of each kind), and all widths by halves. What makes one transformer differ from another stays.
    """
    small = _with(config, _batch(config))
    if _parameters(small) > MOST_PARAMETERS:
        small = _with(small, {"model.vocab_size": min(small.model.vocab_size, 1024)})
    if _parameters(small) > MOST_PARAMETERS:
        small = _with(small, {"model.n_layers": _layers(small)})
    while _parameters(small) > MOST_PARAMETERS and small.model.d_model > _NARROWEST:
        small = _with(small, _halved(small))
    return small, _cuts(config, small)


def _batch(config: Config) -> Changes:
    tokens = min(config.training.sequence_length, MOST_TOKENS)
    changes: Changes = {
        "training.sequence_length": tokens,
        "training.micro_batch_size": min(config.training.micro_batch_size, MOST_SEQUENCES),
    }
    if config.model.position == "learned":
        changes["model.context_length"] = min(config.model.context_length, MOST_TOKENS)
    if config.model.sliding_window >= tokens:  # else it would mask nothing
        changes["model.sliding_window"] = max(tokens // 4, 1)
    if config.model.weights:
        changes["model.weights"] = config.model.weights if _parameters(config) <= MOST_PARAMETERS else ""
    return changes


def _layers(config: Config) -> int:
    model = config.model
    pattern = model.sliding_window_pattern if model.sliding_window else 0
    dense = model.moe.n_dense_layers if model.moe.n_experts else 0
    return min(model.n_layers, max(2, pattern, dense + 2))


def _halved(config: Config) -> Changes:
    """Half as wide; heads keep their width while there are several of them."""
    model = config.model
    changes: Changes = {"model.d_model": model.d_model // 2, "model.d_ff": max(model.d_ff // 2, 1)}
    heads, kept = model.n_heads // 2, max(model.n_kv_heads // 2, 1)
    if model.n_heads % 2 == 0 and heads % kept == 0:
        changes |= {"model.n_heads": heads, "model.n_kv_heads": kept}
    if model.moe.n_experts:
        changes["model.moe.d_expert"] = max(model.moe.d_expert // 2, 1)
    if model.mla.kv_rank:
        changes["model.mla.kv_rank"] = max(model.mla.kv_rank // 2, 1)
        changes["model.mla.q_rank"] = model.mla.q_rank // 2
        changes["model.n_kv_heads"] = changes.get("model.n_heads", model.n_heads)
    return changes


def _with(config: Config, changes: Changes) -> Config:
    return override(config, changes)


def _parameters(config: Config) -> int:
    return count_parameters(config.model).total


def _cuts(config: Config, small: Config) -> list[str]:
    sentences = []
    for section in ("model", "training"):
        before, after = (getattr(one, section).model_dump() for one in (config, small))
        sentences += _differences(before, after, f"{section}.")
    return sentences


def _differences(before: dict[str, object], after: dict[str, object], prefix: str) -> list[str]:
    found = []
    for key, value in before.items():
        other = after[key]
        if isinstance(value, dict) and isinstance(other, dict):
            found += _differences(value, other, f"{prefix}{key}.")
        elif value != other:
            found.append(f"{prefix}{key} from {value or 'none'} to {other or 'none'}")
    return found
