"""What may change between a run and its continuation: every key is decided here."""

from __future__ import annotations

import pytest

from bptool.config.keys import all_keys, choices, dotted
from bptool.config.loading import parse_config
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.errors import ResumeError
from bptool.training.resume import changed_keys, check_resumable

PLACE = {"run.name", "run.directory"}
"""A folder may be moved: not a change at all."""
FREE_IN_MODEL = {"model.dropout", "model.attention", "model.weights", "model.moe.auxiliary_loss"}
FIXED = {key for key in all_keys() if key.startswith("model.")} - FREE_IN_MODEL | {"optimizer.name", "run.workload"}
"""Another model, or another meaning of the optimizer's state."""
GUARDED = {
    "run.seed",
    "data.source",
    "data.tokenizer",
    "data.validation_fraction",
    "training.steps",
    "training.sequence_length",
    "training.micro_batch_size",
    "training.gradient_accumulation_steps",
    "optimizer.lr",
    "schedule.name",
    "schedule.warmup_steps",
    "schedule.final_lr_fraction",
    "schedule.decay_fraction",
}
"""The data order or the schedule: only where the command line names them."""
FREE = FREE_IN_MODEL | {
    "training.clip_norm",
    "training.loss",
    "training.device",
    "training.compile",
    "optimizer.weight_decay",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.eps",
    "optimizer.momentum",
    "optimizer.nesterov",
    "optimizer.implementation",
    "precision.mode",
    "precision.bf16_update",
    "activation_checkpoint.policy",
    "activation_checkpoint.every",
    "activation_checkpoint.budget",
    "activation_checkpoint.plan",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluation.every",
    "evaluation.sequences",
    "evaluation.sample_every",
    "evaluation.sample_tokens",
    "evaluation.prompt",
    "evaluation.temperature",
    "evaluation.top_k",
    "logging.every",
    "logging.tensorboard",
    "logging.gradient_histograms_every",
    "gradients.on_nonfinite",
}
"""Said, and allowed."""

BEFORE = parse_config(
    {
        "run.name": "mine",
        "model.n_kv_heads": 4,
        "model.rope.scaling": "llama3",
        "model.mla.nope_dim": 16,  # with it a latent fits the heads,
        "model.moe.n_active": 1,  # and with this an expert is enough
        "precision.mode": "bf16",  # whose updates may be rounded otherwise
        "training.micro_batch_size": 8,
        "training.gradient_accumulation_steps": 1,
    },
    "a test",
)
ANOTHER = {"activation_checkpoint.plan": "2*full", "activation_checkpoint.budget": "1GiB"}
HALVED = {"model.n_kv_heads", "training.sequence_length", "model.rope.low_frequency_factor"}


def another_value(key: str) -> object:
    """Valid, and not what it is before."""
    value = dotted(BEFORE)[key]
    if key in ANOTHER:
        return ANOTHER[key]
    match value:
        case bool():
            return not value
        case int():
            return value // 2 if key in HALVED else 2 * value or 1
        case float():
            return value / 2 or 0.25
        case _:
            return next((choice for choice in choices(key) if choice != value), "another")


def changed(*keys: str) -> Config:
    return override(BEFORE, {key: another_value(key) for key in keys})


def test_every_key_has_been_decided() -> None:
    assert sorted([*PLACE, *FIXED, *GUARDED, *FREE]) == sorted(all_keys())


@pytest.mark.parametrize("key", sorted(FIXED))
def test_a_fixed_key_is_refused_though_it_is_named(key: str) -> None:
    with pytest.raises(ResumeError, match="cannot be resumed as another model or optimizer") as caught:
        check_resumable(BEFORE, changed(key), {key})
    assert f"\n  {key}: {dotted(BEFORE)[key]} -> {another_value(key)}" in caught.value.message


@pytest.mark.parametrize("key", sorted(GUARDED))
def test_a_guarded_key_must_be_named(key: str) -> None:
    with pytest.raises(ResumeError, match="would alter the data order or the schedule") as caught:
        check_resumable(BEFORE, changed(key), {"logging.every"})
    assert f"\n  {key}: {dotted(BEFORE)[key]} -> {another_value(key)}" in caught.value.message
    assert caught.value.remedy.endswith(f": {key}={another_value(key)}")
    assert check_resumable(BEFORE, changed(key), {key}) == {key: (dotted(BEFORE)[key], another_value(key))}


@pytest.mark.parametrize("key", sorted(FREE))
def test_a_free_key_is_said_and_allowed(key: str) -> None:
    assert check_resumable(BEFORE, changed(key), ()) == {key: (dotted(BEFORE)[key], another_value(key))}


def test_a_run_may_be_moved() -> None:
    assert changed_keys(BEFORE, changed(*PLACE)) == {}
    assert check_resumable(BEFORE, changed(*PLACE), ()) == {}


def test_nothing_changed() -> None:
    assert check_resumable(BEFORE, BEFORE, ()) == {}


def test_another_split_of_the_same_global_batch_needs_no_name() -> None:
    split = {"training.micro_batch_size": 2, "training.gradient_accumulation_steps": 4}  # 8 x 1 before
    changes = check_resumable(BEFORE, override(BEFORE, split), ())
    assert changes == {"training.micro_batch_size": (8, 2), "training.gradient_accumulation_steps": (1, 4)}


def test_every_unnamed_key_is_listed() -> None:
    with pytest.raises(ResumeError) as caught:
        check_resumable(BEFORE, changed("run.seed", "optimizer.lr", "training.steps", "logging.every"), {"run.seed"})
    assert [line.split(":")[0].strip() for line in caught.value.message.splitlines()[1:]] == [
        "training.steps",
        "optimizer.lr",
    ]
