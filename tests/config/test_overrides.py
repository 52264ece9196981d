from __future__ import annotations

import datetime
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.config.overrides import override, parse_overrides
from bptool.config.schema import Config
from bptool.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("training.steps=10", {"training.steps": 10}),
        ("training.steps=1_000", {"training.steps": 1000}),
        ("training.steps = 10", {"training.steps": 10}),
        ("optimizer.lr=1e-3", {"optimizer.lr": 0.001}),
        ("model.rope.theta=5e5", {"model.rope.theta": 500000.0}),
        ("training.compile=true", {"training.compile": True}),
        ("training.compile=True", {"training.compile": "True"}),  # no TOML, so a word
        ("optimizer.name=sgd", {"optimizer.name": "sgd"}),
        ("optimizer.name = sgd", {"optimizer.name": "sgd"}),
        ('optimizer.name="sgd"', {"optimizer.name": "sgd"}),
        ("model.rope={theta=5e5, scaling='none'}", {"model.rope.theta": 5e5, "model.rope.scaling": "none"}),
        ("model={}", {"model": {}}),
        ("no.such.key=[1, 2]", {"no.such.key": [1, 2]}),
        ("no.such.key=2024-01-02", {"no.such.key": datetime.date(2024, 1, 2)}),
        ("model.n-heads=3", {"model.n-heads": 3}),
    ],
)
def test_values_are_toml_and_other_words_are_text(text: str, changes: dict[str, object]) -> None:
    assert parse_overrides([text]) == changes


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("", ""),
        ("3", "3"),
        ("2024-01-02", "2024-01-02"),
        ("true", "true"),
        ("def ", "def "),  # the shell has eaten the quotes: spaces are meant
        ('"def\\n"', "def\n"),
        ("'a\\b'", "a\\b"),
        ("[1, 2]", "[1, 2]"),
        ("a=b", "a=b"),
        ("1\nrun.seed = 2", "1\nrun.seed = 2"),
        ("# no comment", "# no comment"),
    ],
)
def test_keys_that_take_text_take_what_was_typed(typed: str, text: str) -> None:
    assert parse_overrides([f"evaluation.prompt={typed}"]) == {"evaluation.prompt": text}


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])))
def test_quoted_text_comes_through_whole(text: str) -> None:
    quoted = json.dumps(text, ensure_ascii=False)  # a JSON string without control characters is a TOML string
    assert parse_overrides([f"run.name={quoted}"]) == {"run.name": text}


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**70), 2**70))
def test_numbers_come_through_exactly(real: float, whole: int) -> None:
    assert parse_overrides([f"optimizer.lr={real!r}", f"run.seed={whole}"]) == {"optimizer.lr": real, "run.seed": whole}


def test_the_last_of_two_counts() -> None:
    assert parse_overrides(["run.seed=1", "run.seed=2"]) == {"run.seed": 2}


def test_malformed_overrides_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["training.steps", "run.seed=1", "=3", "a..b=1", ".a=1", "a.=1"])
    assert caught.value.problems == (
        "'training.steps': found no '=', expected KEY=VALUE",
        "'=3': found no key before the '='",
        "'a..b=1': found the key 'a..b', expected names with single dots between them",
        "'.a=1': found the key '.a', expected names with single dots between them",
        "'a.=1': found the key 'a.', expected names with single dots between them",
    )
    assert str(caught.value).startswith("command line: 5 problems")
    assert "KEY=VALUE" in caught.value.remedy


def test_a_config_can_be_copied_with_changes() -> None:
    before = Config()
    after = override(before, {"training.compile": True, "model.rope.theta": 5e5})
    assert (after.training.compile, after.model.rope.theta) == (True, 5e5)
    assert override(after, {"training.compile": False, "model.rope.theta": before.model.rope.theta}) == before
