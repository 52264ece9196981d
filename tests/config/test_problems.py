"""Each message, provoked; `tests/config/test_loading.py` has where they come from."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bptool.config.keys import fields, flatten, sections
from bptool.config.loading import parse_config
from bptool.config.problems import validate
from bptool.config.schema import Config
from bptool.errors import ConfigError


def problems_of(values: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "a file")
    return caught.value.problems


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.n_haeds", ", did you mean 'model.n_heads'?"),
        ("modle.n_heads", ", did you mean 'model.n_heads'?"),
        ("optim.lr", ", did you mean 'optimizer.lr'?"),
        ("evaluations.every", ", did you mean 'evaluation.every'?"),
        ("lr", ", did you mean 'optimizer.lr'?"),
        ("training.lr", " in [training], did you mean 'optimizer.lr'?"),
        ("training.warmup_steps", " in [training], did you mean 'schedule.warmup_steps'?"),
        ("model.theta", " in [model], did you mean 'model.rope.theta'?"),
        ("data.name", " in [data], did you mean 'run.name' or 'optimizer.name' or 'schedule.name'?"),
        ("model.n_embd", ", did you mean 'model.d_model'?"),
        ("learning_rate", ", did you mean 'optimizer.lr'?"),
        ("training.steps.more", ", did you mean 'training.steps'?"),
        ("model.warmup_step", ", did you mean 'schedule.warmup_steps'?"),
        ("modle.n_haeds", ", did you mean 'model.n_heads'?"),
        ("model.rope.tehta", ", did you mean 'model.rope.theta'?"),
        ("training.new_key", ""),  # the same section is no likeness
        ("xyzzy", ""),
        ("", ""),
    ],
)
def test_unknown_keys(key: str, hint: str) -> None:
    assert problems_of({key: 1}) == (f"{key}: unknown key{hint}",)


def test_other_tools_names_lead_to_real_keys() -> None:
    for name in ("hidden_size", "block_size", "batch_size", "max_iters", "grad_clip", "dtype", "rope_theta"):
        (problem,) = problems_of({name: 1})
        assert problem.split("'")[1] in fields()


def test_an_unprintable_key_stays_on_its_line() -> None:
    assert problems_of({"a\nb": 1}) == (r'"a\nb": unknown key',)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"model": 3}, "model: found 3, expected a table of keys such as 'model.n_layers'"),
        ({"model": {"rope": []}}, "model.rope: found a list, expected a table of keys such as 'model.rope.theta'"),
        ({"training": {"steps": {}}}, "training.steps: found a table, expected a whole number above 0"),
        ({"training": {"steps": "ten"}}, 'training.steps: found "ten", expected a whole number above 0'),
        ({"training": {"steps": 0}}, "training.steps: found 0, expected a whole number above 0"),
        ({"training": {"steps": 1.5}}, "training.steps: found 1.5, expected a whole number above 0"),
        ({"training": {"steps": True}}, "training.steps: found true, expected a whole number above 0"),
        ({"training": {"steps": "auto"}}, 'training.steps: found "auto", expected a whole number above 0'),
        ({"training": {"steps": None}}, "training.steps: found null, expected a whole number above 0"),
        ({"run": {"seed": -1}}, "run.seed: found -1, expected a whole number at least 0"),
        ({"model": {"d_ff": "Auto"}}, 'model.d_ff: found "Auto", expected a whole number above 0 or "auto"'),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: found nan, expected a number above 0"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: found inf, expected a number above 0"),
        ({"optimizer": {"lr": True}}, "optimizer.lr: found true, expected a number above 0"),
        ({"model": {"dropout": 1}}, "model.dropout: found 1, expected a number at least 0 and below 1"),
        ({"model": {"bias": 1}}, "model.bias: found 1, expected true or false"),
        ({"model": {"bias": "True"}}, "model.bias: found \"True\", expected true or false, did you mean 'true'?"),
        ({"run": {"name": 3}}, "run.name: found 3, expected text"),
        ({"training": {"loss": "fusd"}}, 'training.loss: found "fusd", expected one of "fused", "plain",'
         " did you mean 'fused'?"),
        ({"training": {"loss": "PLAIN"}}, 'training.loss: found "PLAIN", expected one of "fused", "plain",'
         " did you mean 'plain'?"),
        ({"training": {"loss": 3}}, 'training.loss: found 3, expected one of "fused", "plain"'),
        ({"model": {"d_model": 250}}, "model.d_model = 250 is not divisible by model.n_heads = 4;"
         " choose a divisor, or set model.head_dim yourself"),
        (
            {"model": {"moe": {"n_experts": 4, "n_active": 5}}},
            "model.moe.n_active = 5 exceeds the 4 experts that a token can choose of",
        ),
        (
            {"model": {"moe": {"n_experts": 9, "n_groups": 2}}},
            "model.moe.n_experts = 9 does not make model.moe.n_groups = 2 equal groups of two experts or more",
        ),
        (
            {"model": {"moe": {"n_experts": 8, "n_groups": 2, "n_active_groups": 3}}},
            "model.moe.n_active_groups = 3 exceeds model.moe.n_groups = 2",
        ),
        (
            {"model": {"moe": {"n_experts": 4}, "bias": True}},
            "model.bias = true, but experts (model.moe.n_experts = 4) have no biases",
        ),
        (
            {"model": {"mla": {"kv_rank": 4}, "qk_norm": True}},
            "model.qk_norm = true, but latent attention (model.mla.kv_rank = 4) needs false",
        ),
        (
            {"model": {"mla": {"kv_rank": 4}, "n_kv_heads": 2}},
            "model.n_kv_heads = 2, but latent attention (model.mla.kv_rank = 4) needs 4",
        ),
        (
            {"model": {"mla": {"kv_rank": 4}, "head_dim": 32}},
            "model.head_dim = 32 must be model.mla.nope_dim = 32 and model.mla.rope_dim = 16 together",
        ),
        (
            {"model": {"mla": {"kv_rank": 4, "rope_dim": 3}}},
            "model.mla.rope_dim = 3 is odd; rope rotates pairs, so it must be even",
        ),
        (
            {"model": {"rope": {"scaling": "yarn", "beta_slow": 32.0}}},
            "model.rope.beta_fast = 32.0 must exceed model.rope.beta_slow = 32.0",
        ),
        ({"model": {"n_kv_heads": 3}}, "model.n_heads = 4 is not divisible by model.n_kv_heads = 3"),
        ({"model": {"head_dim": 33}}, "model.head_dim = 33 is odd; rope rotates pairs, so it must be even"),
        ({"training": {"sequence_length": 257}}, "training.sequence_length = 257 exceeds model.context_length = 256"),
        ({"run": {"name": "a/b"}}, "run.name = 'a/b' must be the name of one folder, without '/' or a leading '.'"),
        ({"model": {"rope": {"scaling": "llama3", "low_frequency_factor": 9}}},
         "model.rope.high_frequency_factor = 4.0 must exceed model.rope.low_frequency_factor = 9.0"),
    ],
)  # fmt: skip
def test_wrong_values_and_conflicts(values: dict[str, Any], problem: str) -> None:
    assert problems_of(values) == (problem,)


def test_all_the_mistakes_of_a_config_come_at_once() -> None:
    """Unknown keys, wrong values and conflicts, each in a section with another mistake, and across sections."""
    problems = problems_of(
        {
            "run": {"name": "a/b", "seed": -1},
            "model": {"n_haeds": 8, "n_layers": "x", "n_heads": 6, "d_model": 252, "n_kv_heads": 4, "head_dim": 33},
            "training": {"sequence_length": 1024, "steps": "ten"},
            "optimizer": {"lr": -1, "name": "admw"},
            "typo": {"x": 1},
        }
    )
    culprits = ["run.name", "run.seed", "model.n_haeds", "model.n_layers", "model.n_heads = 6", "model.head_dim = 33"]
    culprits += ["training.sequence_length", "training.steps", "optimizer.lr", "optimizer.name", "typo.x"]
    assert len(problems) == len(culprits)
    for culprit in culprits:
        assert [problem for problem in problems if problem.startswith(culprit)], culprit


def test_nothing_follows_from_a_value_that_is_wrong_itself() -> None:
    """Four heads do not divide "x"; and "auto" is not to blame for what it cannot follow from."""
    assert len(problems_of({"model": {"d_model": "x", "n_heads": 3, "n_kv_heads": "auto", "head_dim": "auto"}})) == 1
    assert len(problems_of({"model": {"n_heads": True}})) == 1
    assert len(problems_of({"model": {"context_length": "x"}, "training": {"sequence_length": "auto"}})) == 1
    assert len(problems_of({"model": {"context_length": 0}, "training": {"sequence_length": 512}})) == 1
    assert len(problems_of({"model": {"head_dim": -1, "position": "rope"}})) == 1


def test_a_conflict_does_not_hide_the_next_one() -> None:
    problems = problems_of({"model": {"d_model": 250, "n_heads": 4, "n_kv_heads": 3}})
    assert [problem.split(" = ")[0] for problem in problems] == ["model.d_model", "model.n_heads"]


def test_a_float_that_is_whole_does_for_a_whole_number() -> None:
    config = parse_config({"training": {"steps": 1e3}, "model": {"head_dim": 32.0}}, "a file")
    assert (config.training.steps, config.model.head_dim) == (1000, 32)
    assert type(config.training.steps) is int


def test_an_empty_table_says_nothing() -> None:
    assert parse_config({"model": {"rope": {}}, "run": {}}, "a file") == Config()


scalars = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.sampled_from(["auto", "x", "none"])
names = st.sampled_from([*{part for key in fields() for part in key.split(".")}, "n_haeds", "x.y", "", "\n"])
tables: st.SearchStrategy[Any] = st.recursive(
    scalars | st.lists(scalars, max_size=2), lambda inner: st.dictionaries(names, inner, max_size=5), max_leaves=15
)
known_keys = st.dictionaries(st.sampled_from(sorted(fields())), scalars, max_size=8)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(names, tables, max_size=6) | known_keys)
def test_whatever_a_file_holds_is_a_config_or_a_list_of_problems(values: dict[str, Any]) -> None:
    flat = flatten(values)
    unknown = [key for key, value in flat.items() if key not in fields() and not (key in sections() and value == {})]
    result = validate(flat)
    if isinstance(result, Config):
        assert not unknown
        return
    assert result
    assert set(unknown) <= {key for problem in result for key in problem.keys}
    assert all("\n" not in problem.text and problem.text for problem in result)
    assert len({problem.text for problem in result}) == len(result)


@settings(deadline=None, max_examples=60)
@given(known_keys)
def test_a_value_that_is_wrong_by_itself_is_told_whatever_else_is_wrong(values: dict[str, Any]) -> None:
    alone = [validate({key: value}) for key, value in values.items()]
    wrong_alone = {result[0].text for result in alone if not isinstance(result, Config) and "found" in result[0].text}
    together = validate(values)
    assert wrong_alone <= set() if isinstance(together, Config) else {problem.text for problem in together}
