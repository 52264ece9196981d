from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.config.keys import all_keys, allowed, allows_auto, choices, dotted, fields, flatten, nest, sections, shown
from bptool.config.schema import Config

TABLES = {"run", "model", "model.rope", "data", "training", "optimizer", "schedule", "precision", "checkpoint"}


def test_every_key_is_documented() -> None:
    keys = all_keys()
    assert {"run.seed", "model.n_layers", "model.rope.theta", "optimizer.lr"} <= keys.keys()
    assert keys["model.d_model"] == "Width of the residual stream."
    assert not [key for key, text in keys.items() if not text.endswith(".")]


def test_keys_are_the_leaves_of_a_config() -> None:
    values = dotted(Config())
    assert list(values) == list(all_keys())
    assert values["model.rope.theta"] == Config().model.rope.theta
    assert values["training.steps"] == Config().training.steps


def test_sections_are_the_tables() -> None:
    assert sections() >= TABLES
    assert not sections() & all_keys().keys()


def test_flatten_by_hand() -> None:
    assert flatten({"a": 1, "b": {"c": {"d": 2}, "e": {}}, "f.g": [3]}) == {"a": 1, "b.c.d": 2, "b.e": {}, "f.g": [3]}


@given(st.sets(st.sampled_from(sorted(fields()))))
def test_nest_undoes_flatten(keys: set[str]) -> None:
    flat = dict.fromkeys(keys, 1)
    assert flatten(nest(flat)) == flat


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.steps", "a whole number above 0"),
        ("run.seed", "a whole number at least 0"),
        ("model.head_dim", 'a whole number above 0 or "auto"'),
        ("optimizer.lr", "a number above 0"),
        ("model.dropout", "a number at least 0 and below 1"),
        ("schedule.final_lr_fraction", "a number at least 0 and at most 1"),
        ("model.bias", "true or false"),
        ("run.name", "text"),
        ("training.device", "text"),
        ("training.loss", 'one of "fused", "plain"'),
    ],
)
def test_what_a_key_takes_in_words(key: str, words: str) -> None:
    assert allowed(key) == words


@pytest.mark.parametrize("key", fields())
def test_what_every_key_takes_can_be_said(key: str) -> None:
    assert allowed(key)
    assert not choices(key) or all(f'"{choice}"' in allowed(key) for choice in choices(key))


def test_auto_follows_from_other_keys_for_numbers_alone() -> None:
    automatic = {key for key in fields() if allows_auto(key)}
    model = {f"model.{key}" for key in ("n_kv_heads", "head_dim", "d_ff", "query_scale_dim")}
    assert automatic == {*model, "training.sequence_length"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("ten", '"ten"'),
        ('a"b\n', r'"a\"b\n"'),
        (True, "true"),
        (None, "null"),
        (1e-3, "0.001"),
        ({"a": 1}, "a table"),
        ([1], "a list"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        ("x" * 100, '"' + "x" * 56 + "..."),
    ],
)
def test_values_are_shown_as_a_file_has_them(value: object, text: str) -> None:
    assert shown(value) == text
