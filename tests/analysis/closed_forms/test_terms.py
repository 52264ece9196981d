"""Closed forms of states, inputs and logits, against real models, real optimizers and published figures."""

from __future__ import annotations

import re
from collections import Counter
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import run_steps, small_config, transformer_step

from bptool.analysis.closed_forms.formula import Amount, amount, total
from bptool.analysis.closed_forms.terms import (
    COVERED,
    bytes_per_parameter,
    is_gpt_layer,
    loss_operands,
    optimizer_state,
    paper_layers,
    parameters_of,
    uncovered,
    weights,
)
from bptool.analysis.machine import machine_named
from bptool.analysis.memory.simulation import STEADY, simulate
from bptool.config.loading import load_config, parse_config
from bptool.config.schema import Config
from bptool.config.target import resolve_target
from bptool.errors import ConfigError
from bptool.training.workload import transformer_workload

PLAIN_GPT = {
    "model.norm": "layernorm",
    "model.position": "learned",
    "model.activation": "gelu",
    "model.bias": True,
    "model.d_ff": 64,
}
ARCHITECTURES = [
    {},
    PLAIN_GPT,
    {"model.n_kv_heads": 1, "model.qk_norm": True, "model.tied_embeddings": False},
    {"model.norm": "layernorm", "model.head_dim": 6, "model.bias": False},
    {"model.norm": "none", "model.position": "none", "model.activation": "relu"},
]
OPTIMIZERS = ["gradient-descent", "sgd", "adam", "adamw", "muon", "adafactor"]


class TestFormula:
    @given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 99), st.integers(1, 9999)), min_size=1, max_size=4))
    def test_the_text_is_the_number(self, products: list[tuple[int, int, int]]) -> None:
        size = total(amount(each, b=b, s=s) for each, b, s in products)
        written = size.formula.split(" = ")[1].replace(",", "").replace("·", "*")
        assert eval(written) == size.n_bytes == sum(prod(product) for product in products)

    def test_like_products_are_one(self) -> None:
        assert total([amount(2, b=3, h=5), amount(8), amount(4, b=3, h=5)]).formula == "6·b·h + 8 = 6·3·5 + 8"

    def test_a_square_and_nothing(self) -> None:
        assert amount(1, s=7, s_2=7).formula == "1·s·s = 1·7·7"
        assert total([]) == Amount()
        assert (Amount().n_bytes, Amount().formula) == (0, "0")


@pytest.mark.parametrize("changes", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_parameters_are_the_models_own(changes: dict[str, object], mode: str) -> None:
    config = small_config({**changes, "precision.mode": mode})
    with torch.device("meta"):
        model = transformer_workload(config).model()
    built = Counter((tuple(p.shape), name.startswith("blocks.")) for name, p in model.named_parameters())
    predicted = parameters_of(config)
    assert Counter((p.shape, p.in_block) for p in predicted) == built
    assert {p.each for p in predicted} == {2 if mode == "bf16" else 4}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("mode", "update"), [("fp32", "nearest"), ("bf16", "nearest"), ("bf16", "stochastic"), ("bf16", "master")]
)
def test_optimizer_state_is_what_torchs_optimizers_hold(name: str, mode: str, update: str) -> None:
    precision = {"precision.mode": mode, "precision.bf16_update": update}
    config = small_config({**PLAIN_GPT, "optimizer.name": name, **precision})
    step = transformer_step(config)
    run_steps(step, 1)
    held = sum(tensor.nbytes for tensor in step.optimizers.state().values())
    assert optimizer_state(config, parameters_of(config)).size.n_bytes == held


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("implementation", ["auto", "loop"])
def test_a_gpu_does_not_hold_counters_that_are_in_host_memory(name: str, implementation: str) -> None:
    """Against the ledger of CUDA's stand-in, which counts each state once and rounds nothing."""
    changes = {**PLAIN_GPT, "optimizer.name": name, "optimizer.implementation": implementation}
    try:
        trace = simulate(
            small_config(changes), transformer_workload(small_config(changes)), machine_named("cuda", "h100")
        )
    except ConfigError:
        pytest.skip("there is no such implementation")
    held = [a for a in trace.live_at(int(trace.events_of(STEADY, "optimizer")[0])) if a.category == "optimizer_state"]
    config = small_config(changes)
    assert optimizer_state(config, parameters_of(config), "cuda").size.n_bytes == sum(a.n_bytes for a in held)


def test_momentum_of_nothing_is_not_held() -> None:
    config = small_config({"optimizer.name": "sgd", "optimizer.momentum": 0.0})
    assert optimizer_state(config, parameters_of(config)).size.n_bytes == 0


@pytest.mark.parametrize(
    ("mode", "expected"), [("fp32", [4, 4, 8]), ("bf16-mixed", [4, 4, 8]), ("bf16", [2, 2, 4]), ("tf32", [4, 4, 8])]
)
def test_bytes_a_parameter_of_adamw(mode: str, expected: list[int]) -> None:
    config = parse_config({"precision.mode": mode, "optimizer.name": "adamw"}, "a test")
    found = [each for _, each in bytes_per_parameter(config, parameters_of(config))]
    assert found == pytest.approx(expected, rel=1e-3)  # and 4 bytes for each tensor


@pytest.mark.parametrize(("update", "state"), [("nearest", 4), ("stochastic", 4), ("master", 12)])
def test_bytes_a_parameter_of_adamw_in_bf16(update: str, state: int) -> None:
    """ZeRO's recipe with a master copy: 2 + 2 + (4 + 4 + 4)."""
    changes = {"precision.mode": "bf16", "precision.bf16_update": update, "optimizer.name": "adamw"}
    config = parse_config(changes, "a test")
    found = [each for _, each in bytes_per_parameter(config, parameters_of(config))]
    assert found == pytest.approx([2, 2, state], rel=1e-3)


class TestSeventyBillion:
    """Llama 3 70B has 70,553,706,496 parameters: 140 GB in 16 bits, and 560 GB of float32 moments, as people say."""

    def config(self, mode: str) -> Config:
        return load_config(resolve_target("llama3-70b"), [f"precision.mode={mode}"])

    def test_weights_in_16_bits(self) -> None:
        size = weights(parameters_of(self.config("bf16"))).size
        assert size.n_bytes == 2 * 70_553_706_496
        assert size.formula == "2·P = 2·70,553,706,496"
        assert size.n_bytes / 1e9 == pytest.approx(140, rel=0.01)

    def test_moments_in_float32(self) -> None:
        config = self.config("fp32")
        parameters = parameters_of(config)
        n_bytes = optimizer_state(config, parameters).size.n_bytes
        assert n_bytes == 8 * 70_553_706_496 + 4 * len(parameters)
        assert n_bytes / 1e9 == pytest.approx(560, rel=0.01)


class TestPaper:
    """Korthikanti et al. 2022, of GPT-3: a = 96, s = 2048, h = 12288."""

    config = small_config(
        {
            **PLAIN_GPT,
            "model.d_model": 12288,
            "model.d_ff": 4 * 12288,
            "model.n_heads": 96,
            "model.context_length": 2048,
            "training.micro_batch_size": 1,
        }
    )

    def test_scores_are_80_of_114(self) -> None:
        sbh = 2048 * 12288
        whole, without_scores = paper_layers(self.config, recomputed=False)
        assert whole.size.n_bytes == sbh * (34 + 80)
        assert without_scores.size.n_bytes == 34 * sbh
        assert 1 - without_scores.size.n_bytes / whole.size.n_bytes == pytest.approx(0.70, abs=0.005)  # "saves 70%"

    def test_full_recomputation(self) -> None:
        (only,) = paper_layers(self.config, recomputed=True)
        assert only.size.n_bytes == 2 * 2048 * 12288

    @pytest.mark.parametrize(
        "changes", [{"model.n_kv_heads": 1}, {"model.d_ff": 48}, {"model.activation": "swiglu"}, {"model.head_dim": 4}]
    )
    def test_other_layers_are_not_the_papers(self, changes: dict[str, object]) -> None:
        assert is_gpt_layer(small_config(PLAIN_GPT))
        assert not is_gpt_layer(small_config({**PLAIN_GPT, **changes}))


class TestUncovered:
    @pytest.mark.parametrize("preset", ["tiny", "gpt2", "gpt2-xl", "llama3.2-1b", "llama3-405b"])
    def test_the_presets_are_covered(self, preset: str) -> None:
        assert uncovered(load_config(resolve_target(preset), [])) == []

    def test_what_is_not_is_named(self) -> None:
        config = small_config({"model.norm": "none", "model.residual": False})
        assert uncovered(config) == ["model.norm = 'none'", "model.residual = False"]

    def test_a_key_from_later_counts_where_it_is_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if `model.bias` had come after the closed forms."""
        monkeypatch.delitem(COVERED, "model.bias")
        assert uncovered(small_config()) == []
        assert uncovered(small_config({"model.bias": True})) == ["model.bias = True"]

    @pytest.mark.parametrize("policy", ["attention", "mlp", "save_matmuls", "save_attention", "offload"])
    def test_a_policy_that_treats_a_part_of_a_block_is_not_covered(self, policy: str) -> None:
        config = small_config({"activation_checkpoint.policy": policy, "activation_checkpoint.plan": "2*full"})
        assert uncovered(config) == [f"activation_checkpoint.policy = '{policy}'"]  # which reads no plan


def test_operands_of_the_loss_are_there_once() -> None:
    """2 x 16 tokens of width 16, vocabulary 32: under autocast the fused loss has its input in two formats."""
    mixed = {"precision.mode": "bf16-mixed"}
    assert loss_operands(small_config(mixed)).size.n_bytes == 32 * 16 * (4 + 2) + 32 * 16 * 2
    assert loss_operands(small_config({"training.loss": "plain"})).size.n_bytes == 0


def test_every_term_names_its_numbers() -> None:
    config = small_config({**PLAIN_GPT, "optimizer.name": "muon"})
    formula = optimizer_state(config, parameters_of(config)).size.formula
    # Two blocks, each with four matrices of 16 x 16 and two of 16 x 64.
    assert re.fullmatch(r"4·M \+ 8·R \+ 4·T = 4·6,144 \+ 8·[\d,]+ \+ 4·\d+", formula)
