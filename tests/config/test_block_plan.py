from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.config.block_plan import BLOCK_POLICIES, BlockPolicy, parse_plan, saved_operations, write_plan, write_saved
from bptool.config.loading import parse_config
from bptool.errors import ConfigError

operations = st.sets(
    st.sampled_from(["mm-1", "mm-2", "mm-12", "attention-1", "_softmax-3", "native_layer_norm-2"]), min_size=1
)
policies = st.one_of(st.sampled_from(BLOCK_POLICIES), operations.map(write_saved))


@given(st.lists(policies, min_size=1))
def test_what_is_written_is_read_again(plan: list[BlockPolicy]) -> None:
    assert parse_plan(write_plan(plan)) == plan


def test_a_plan_by_hand() -> None:
    assert parse_plan("2*full + none+ 1*mlp") == ["full", "full", "none", "mlp"]
    assert write_plan(["full", "full", "none", "full"]) == "2*full+1*none+1*full"


def test_operations_by_hand() -> None:
    assert parse_plan("2*save:mm-2-1.attention-1") == ["save:attention-1.mm-1-2"] * 2
    assert saved_operations("save:attention-1.mm-1-2") == {"attention-1", "mm-1", "mm-2"}


def wrong(changes: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({f"activation_checkpoint.{key}": value for key, value in changes.items()}, "a test")
    return str(caught.value)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("3*ful", "'ful' is none of none, full, .*did you mean 'full'"),
        ("0*full", "'0' is no number of blocks"),
        ("x*full", "'x' is no number of blocks"),
        ("full+", "'' is none of"),
        ("2*save:", "'save:' lists no operations; write them as in save:attention-1.mm-1-2-4"),
        ("2*save:mm", "'save:mm' lists no operations"),
        ("2*save:mm-0", "'save:mm-0' lists no operations"),
        ("3*full", r"is for 3 blocks, and model.n_layers = \d"),
    ],
)
def test_what_is_no_plan_is_told(plan: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({"activation_checkpoint.policy": "plan", "activation_checkpoint.plan": plan}, "a test")


def test_a_policy_that_needs_a_plan_says_so() -> None:
    assert "'plan' needs activation_checkpoint.plan, such as" in wrong({"policy": "plan"})


def test_a_compiled_block_saves_what_has_the_same_number_in_it() -> None:
    settings = {"training.compile": True, "activation_checkpoint.policy": "plan", "model.n_layers": 2}
    with pytest.raises(ConfigError, match=r"saves mul-2, which with training\.compile = true may be"):
        parse_config({**settings, "activation_checkpoint.plan": "2*save:attention-1.mm-2.mul-2"}, "a test")
    parse_config({**settings, "activation_checkpoint.plan": "1*save:attention-1.mm-2+1*save_matmuls"}, "a test")


def test_a_policy_that_does_not_exist_names_the_nearest() -> None:
    assert "did you mean 'save_matmuls'" in wrong({"policy": "save_matmul"})
