"""Comma lists on the command line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.config.axes import Axis, labels, rows_of, setting, split_axes, split_values
from bptool.config.overrides import parse_overrides
from bptool.errors import ConfigError

POLICY = "activation_checkpoint.policy"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("fp32", ["fp32"]),
        ("fp32,bf16", ["fp32", "bf16"]),
        ("fp32, bf16", ["fp32", " bf16"]),
        ("fp32,", ["fp32", ""]),
        ('"a,b"', ['"a,b"']),
        ('"a,b",c', ['"a,b"', "c"]),
        ("'a,b', \"c,d\"", ["'a,b'", ' "c,d"']),
        ('"a\\",b",c', ['"a\\",b"', "c"]),
        ("{theta=1,scaling='x,}'},{theta=2}", ["{theta=1,scaling='x,}'}", "{theta=2}"]),
        ("[1,[2,3]],4", ["[1,[2,3]]", "4"]),
        ("it's,that's", ["it's", "that's"]),
        ("", [""]),
    ],
)
def test_only_commas_at_the_top_separate(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters=",([{)]}\"'")), min_size=1))
def test_what_has_neither_quotes_nor_brackets_is_split_as_python_does(parts: list[str]) -> None:
    assert split_values(",".join(parts)) == ",".join(parts).split(",")


def test_words_with_a_comma_are_axes_and_others_are_not() -> None:
    split = split_axes([f"{POLICY}=none, full", "optimizer.lr=1e-3", "training.micro_batch_size=1,2"])
    assert split.overrides == ["optimizer.lr=1e-3"]
    assert split.axes == [Axis(POLICY, ("none", "full")), Axis("training.micro_batch_size", ("1", "2"))]


def test_rows_are_the_cartesian_product() -> None:
    rows = rows_of([Axis("a", ("1", "2")), Axis("b", ("x", "y", "z"))])
    assert rows == [{"a": a, "b": b} for a in ("1", "2") for b in ("x", "y", "z")]
    assert rows_of([]) == [{}]


@pytest.mark.parametrize(
    ("typed", "changes"),
    [
        (f"{POLICY}=budget:4GiB", {POLICY: "budget", "activation_checkpoint.budget": "4GiB"}),
        (f"{POLICY}=every_k:3", {POLICY: "every_k", "activation_checkpoint.every": 3}),
        (f"{POLICY}=plan:2*full+none", {POLICY: "plan", "activation_checkpoint.plan": "2*full+none"}),
        (f"{POLICY}=full:3", {POLICY: "full:3"}),
        ("run.name=budget:4GiB", {"run.name": "budget:4GiB"}),
    ],
)
def test_a_policy_may_bring_the_key_that_it_needs(typed: str, changes: dict[str, object]) -> None:
    assert parse_overrides([typed]) == changes


@pytest.mark.parametrize(
    ("word", "value"), [("4", 4), ("true", True), ("1e-3", 1e-3), ("'a'", "a"), ("{theta=1.0}", "{theta=1.0}")]
)
def test_a_record_has_values_not_text(word: str, value: object) -> None:
    assert setting(Axis("model.rope" if "{" in word else "no.such", (word,)), word) == value


def problems(*words: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        split_axes(words)
    return raised.value.problems


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (f"{POLICY}=none,save_matmul", ("save_matmul", "did you mean 'save_matmuls'?")),
        (f"{POLICY}=none,budgt:4GiB", ("budgt:4GiB", "did you mean 'budget'?")),
        (f"{POLICY}=none,budget:much", ("'much' is no quantity of memory",)),
        (f"{POLICY}=none,plan:2*ful", ("did you mean 'full'?",)),
        (f"{POLICY}=none,every_k:0", ("activation_checkpoint.every", "above 0")),
        ("precison.mode=fp32,bf16", ("precison.mode: unknown key", "did you mean 'precision.mode'?")),
        ("precision.mode=fp32,fp31", ("fp31", "did you mean 'fp32'?")),
        ("precision.mode=fp32,,bf16", ("no value beside a comma",)),
        ("precision.mode=fp32,bf16,fp32", ("fp32 given more than once",)),
        ("training.compile=true,maybe", ("maybe", "true or false")),
        ("training.micro_batch_size=1,0", ("found 0", "above 0")),
    ],
)
def test_mistakes_are_told_with_the_nearest_name(word: str, told: tuple[str, ...]) -> None:
    (problem,) = problems(word)
    assert all(part in problem for part in told), problem


def test_all_mistakes_come_at_once() -> None:
    found = problems(f"{POLICY}=non,full", "precision.mode=fp32,fp32", "optimizer.lrr=1", "optimizer.name=adm,sgd")
    assert len(found) == 4


@pytest.mark.parametrize(
    "words",
    [
        ("precision.mode=fp32,bf16", "precision.mode=bf16"),
        ("precision.mode=fp32,bf16", "precision.mode=bf16,fp32"),
        (f"{POLICY}=none,budget:4GiB", "activation_checkpoint.budget=1GiB,2GiB"),
        ("model.rope={theta=1e4},{theta=1e5}", "model.rope.theta=1e6"),
    ],
)
def test_a_key_is_set_once(words: tuple[str, ...]) -> None:
    (problem,) = problems(*words)
    assert all(word in problem for word in words)


def test_what_contradicts_other_keys_is_not_told_here() -> None:
    assert split_axes([f"{POLICY}=save_matmuls,none", "training.compile=true,false"]).axes


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{POLICY: "none", "precision.mode": "fp32"}, {POLICY: "full", "precision.mode": "fp32"}], ["none", "full"]),
        ([{POLICY: "none"}, {POLICY: "budget:4GiB"}], ["none", "budget:4GiB"]),
        (
            [{"training.micro_batch_size": 1}, {"training.micro_batch_size": 2}],
            ["micro_batch_size=1", "micro_batch_size=2"],
        ),
        ([{"training.compile": True}, {"training.compile": False}], ["compile=true", "compile=false"]),
        (
            [{"model.attention": "sdpa", POLICY: "none"}, {"model.attention": "eager", POLICY: "full"}],
            ["sdpa none", "eager full"],
        ),
        ([{POLICY: "none"}], ["none"]),
    ],
)
def test_labels_are_what_varies(rows: list[dict[str, object]], words: list[str]) -> None:
    assert labels(rows) == words
