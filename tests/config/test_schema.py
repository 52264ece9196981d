from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bptool.config.schema import Config, ConflictError, ModelSettings, OptimizerSettings

small = st.integers(min_value=1, max_value=64)


def conflict_keys(error: ValidationError) -> set[str]:
    causes = [line.get("ctx", {}).get("error") for line in error.errors()]
    return {key for cause in causes if isinstance(cause, ConflictError) for key in cause.keys}


@pytest.mark.parametrize("mode", ["fp32", "tf32", "bf16-mixed", "fp16-mixed"])
@pytest.mark.parametrize("update", ["stochastic", "master"])
def test_only_bf16_weights_are_rounded(mode: str, update: str) -> None:
    with pytest.raises(ValidationError, match=f"bf16_update = '{update}' is for weights of bf16") as caught:
        Config.model_validate({"precision": {"mode": mode, "bf16_update": update}})
    assert conflict_keys(caught.value) == {"precision.bf16_update", "precision.mode"}


def test_auto_is_replaced_by_numbers() -> None:
    model = ModelSettings(d_model=384, n_heads=6)
    assert (model.n_kv_heads, model.head_dim) == (6, 64)
    assert Config().training.sequence_length == Config().model.context_length


@pytest.mark.parametrize(
    ("activation", "d_model", "d_ff"),
    [
        ("gelu", 768, 3072),
        ("relu", 100, 400),
        ("swiglu", 256, 704),  # 682.67, rounded up to 11 x 64
        ("swiglu", 768, 2048),  # exactly 32 x 64
        ("swiglu", 4096, 10944),  # 10922.67, rounded up to 171 x 64
    ],
)
def test_auto_d_ff(activation: Any, d_model: int, d_ff: int) -> None:
    assert ModelSettings(activation=activation, d_model=d_model, n_heads=1).d_ff == d_ff


def test_sequence_length_follows_the_context_of_a_table_and_of_a_section() -> None:
    for model in ({"context_length": 512}, ModelSettings(context_length=512)):
        assert Config.model_validate({"model": model}).training.sequence_length == 512


@settings(deadline=None)
@given(d_model=small, n_heads=small, n_kv_heads=small | st.just("auto"), rope=st.booleans())
def test_shapes_are_accepted_exactly_when_they_divide(
    d_model: int, n_heads: int, n_kv_heads: int | str, rope: bool
) -> None:
    divides = d_model % n_heads == 0 and (n_kv_heads == "auto" or n_heads % int(n_kv_heads) == 0)
    fits = divides and not (rope and (d_model // n_heads) % 2)
    values = {"d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    try:
        ModelSettings.model_validate({**values, "position": "rope" if rope else "none"})
    except ValidationError:
        assert not fits
    else:
        assert fits


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"model": {"d_model": 250}}, {"model.d_model", "model.n_heads", "model.head_dim"}),
        ({"model": {"n_kv_heads": 3}}, {"model.n_heads", "model.n_kv_heads"}),
        ({"model": {"head_dim": 33}}, {"model.head_dim", "model.d_model", "model.n_heads", "model.position"}),
        ({"training": {"sequence_length": 257}}, {"training.sequence_length", "model.context_length"}),
        ({"run": {"name": "a/b"}}, {"run.name"}),
        (
            {"model": {"rope": {"scaling": "llama3", "high_frequency_factor": 1}}},
            {f"model.rope.{key}" for key in ("scaling", "high_frequency_factor", "low_frequency_factor")},
        ),
    ],
)
def test_a_conflict_names_all_the_keys_that_it_depends_on(values: dict[str, Any], keys: set[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(values)
    assert conflict_keys(caught.value) == keys


@pytest.mark.parametrize("name", ["a/b", "/", "..", ".hidden", "a\nb", "a\0b", "a/"])
def test_a_run_is_named_like_one_folder(name: str) -> None:
    with pytest.raises(ValidationError, match=r"run\.name"):
        Config.model_validate({"run": {"name": name}})


@pytest.mark.parametrize("name", ["", "gpt2-xl", "run 3", "llama3.2-1b", "läuft"])
def test_names_of_folders_are_accepted(name: str) -> None:
    assert Config.model_validate({"run": {"name": name}}).run.name == name


def test_a_head_may_be_wider_than_its_share() -> None:
    assert ModelSettings(d_model=100, n_heads=3, head_dim=48).head_dim == 48


def test_a_whole_number_does_for_a_float_and_a_bool_for_neither() -> None:
    assert OptimizerSettings.model_validate({"lr": 1}).lr == 1.0
    for key in ("lr", "beta1"):
        with pytest.raises(ValidationError):
            OptimizerSettings.model_validate({key: True})


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().training.steps = 3  # type: ignore[misc]
