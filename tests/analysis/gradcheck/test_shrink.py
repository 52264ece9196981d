"""Configs that float64 can afford, of the same kind as those asked for."""

from __future__ import annotations

import pytest

from bptool.analysis.gradcheck.shrink import MOST_PARAMETERS, shrunk
from bptool.config.loading import load_config
from bptool.config.presets import preset_names
from bptool.config.target import resolve_target
from bptool.model.accounting import count_parameters


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_becomes_small_and_stays_of_its_kind(preset: str) -> None:
    config = load_config(resolve_target(preset), [])
    small, cuts = shrunk(config)
    assert count_parameters(small.model).total <= MOST_PARAMETERS
    assert small.training.sequence_length * small.training.micro_batch_size <= 128
    for key in ("norm", "activation", "position", "bias", "tied_embeddings", "qk_norm", "attention"):
        assert getattr(small.model, key) == getattr(config.model, key)
    assert (small.model.n_kv_heads < small.model.n_heads) == (config.model.n_kv_heads < config.model.n_heads)
    assert (f"model.d_model from {config.model.d_model} to {small.model.d_model}" in cuts) == (
        small.model.d_model != config.model.d_model
    )


def test_what_is_small_is_left_alone() -> None:
    settings = ["model.d_model=32", "training.micro_batch_size=2", "training.sequence_length=16"]
    config = load_config(resolve_target(None), settings)
    assert shrunk(config) == (config, [])


def test_every_cut_is_said() -> None:
    config = load_config(resolve_target("gpt2"), [])
    small, cuts = shrunk(config)
    before, after = config.model.model_dump(), small.model.model_dump()
    changed = {f"model.{key}" for key in before if before[key] != after[key]}
    assert changed <= {cut.partition(" ")[0] for cut in cuts}
    assert "training.sequence_length from 1024 to 64" in cuts


def test_a_mask_still_masks_and_experts_are_still_experts() -> None:
    settings = ["model.sliding_window=128", "model.moe.n_experts=8", "model.d_model=1024", "model.moe.d_expert=4096"]
    small, _ = shrunk(load_config(resolve_target(None), settings))
    assert 0 < small.model.sliding_window < small.training.sequence_length
    assert small.model.moe.n_experts == 8
    assert count_parameters(small.model).total <= MOST_PARAMETERS
