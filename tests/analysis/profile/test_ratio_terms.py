"""The terms add up to the ratio, exactly; each reason by hand."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import small_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bptool.analysis.machine import Machine
from bptool.analysis.profile import ratio_terms as reasons
from bptool.analysis.profile.counting import count
from bptool.analysis.profile.parts import flop_counts
from bptool.analysis.profile.tally import Cost, ModuleFacts, Place, Tally
from bptool.instruments.operations.trace import Kind
from bptool.training.workload import Workload, transformer_workload


def built_in(changes: dict[str, Any]) -> Tally:
    config = small_config(changes)
    return count(config, transformer_workload(config))


def own(model: nn.Module, *shape: int) -> Tally:
    """Of a user's own model, run in earnest, on a batch that wants no gradient."""
    workload = Workload(
        model=lambda: model, batch=lambda generator: torch.randn(*shape), loss=lambda model, x: first(model(x)).sum()
    )
    return count(small_config({}), workload, Machine(fake=False))


def first(result: Any) -> Tensor:
    found = result if isinstance(result, Tensor) else result[0]
    assert isinstance(found, Tensor)
    return found


def ratio(tally: Tally) -> Fraction:
    return Fraction(tally.flops("dgrad", "wgrad"), tally.flops("forward"))


def named(tally: Tally) -> dict[str, Fraction]:
    return {term.name: term.excess for term in reasons.exact_ratio_terms(tally) if term.excess}


TRANSFORMERS: list[dict[str, Any]] = [
    {},
    {"model.attention": "eager"},
    {"activation_checkpoint.policy": "full", "training.loss": "plain"},
    {"activation_checkpoint.policy": "every_k", "model.n_layers": 3},
    {"model.moe.n_experts": 4, "activation_checkpoint.policy": "full"},
]


@pytest.mark.parametrize("changes", TRANSFORMERS, ids=str)
def test_a_transformers_terms_add_up(changes: dict[str, Any]) -> None:
    tally = built_in(changes)
    assert sum(named(tally).values()) == ratio(tally) - 2
    printed = flop_counts(tally).backward_over_forward
    assert printed is not None
    assert abs(sum(term.excess_over_two for term in reasons.ratio_terms(tally)) - (printed - 2)) < 1e-12
    again = Fraction(tally.flops("recompute"), tally.flops("forward"))
    terms = reasons.exact_recompute_terms(tally)
    assert sum(term.excess for term in terms) == (again - 1 if again else 0)


class TestReasons:
    def test_attention_makes_its_scores_again(self) -> None:
        tally = built_in({})
        score_product = 2 * 2 * 2 * 16 * 16 * 16  # layers, FLOPs, batch, tokens, tokens, width
        assert named(tally) == {reasons.RESCORING: Fraction(score_product, tally.flops("forward"))}
        embeddings = [term for term in reasons.ratio_terms(tally) if term.name == reasons.EMBEDDINGS]
        assert [(term.excess_over_two, term.detail) for term in embeddings] == [(0.0, "embedding")]

    def test_attention_written_out_does_not(self) -> None:
        assert named(built_in({"model.attention": "eager"})) == {}

    def test_a_first_layer(self) -> None:
        tally = own(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), 4, 8)
        assert ratio(tally) == Fraction(3, 2)
        assert named(tally) == {reasons.NO_DGRAD: Fraction(-1, 2)}

    def test_frozen_layers(self) -> None:
        """The first has no backward at all; the last passes a gradient on."""
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        model[0].requires_grad_(False)
        model[2].requires_grad_(False)
        assert named(own(model, 4, 8)) == {
            reasons.NO_BACKWARD: Fraction(-2, 3),
            reasons.NO_DGRAD: Fraction(-1, 3),
            reasons.NO_WGRAD: Fraction(-1, 3),
        }

    def test_an_adapter_owes_both_and_its_base_one(self) -> None:
        class Adapted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.base = nn.Linear(8, 8).requires_grad_(False)
                self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.base(x) + self.up(self.down(x))
                return y

        tally = own(nn.Sequential(nn.Linear(8, 8), Adapted()), 4, 8)
        layer, adapter = 2 * 4 * 8 * 8, 2 * 2 * 4 * 8 * 2
        forward = 2 * layer + adapter
        assert named(tally) == {
            reasons.NO_DGRAD: Fraction(-layer, forward),
            reasons.NO_WGRAD: Fraction(-layer, forward),
        }
        frozen = next(term for term in reasons.ratio_terms(tally) if term.name == reasons.NO_WGRAD)
        assert frozen.detail == "*.base"

    def test_a_layer_that_is_called_twice(self) -> None:
        """Its first call owes one gradient and its second both."""

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.layer(self.layer(x))
                return y

        assert named(own(Twice(), 4, 8)) == {reasons.NO_DGRAD: Fraction(-1, 2)}

    def test_pytorchs_own_attention(self) -> None:
        """Written out, as its weights are asked for: scores owe two gradients, and the input's product lacks one."""

        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.attention(x, x, x)[0]
                return y

        rows, tokens = 3 * 4, 4
        into, scores, out = 2 * rows * 8 * 24, 2 * 2 * rows * tokens * 8, 2 * rows * 8 * 8
        assert named(own(Attention(), 3, tokens, 8)) == {reasons.NO_DGRAD: Fraction(-into, into + scores + out)}

    def test_what_has_no_one_reason_is_told_by_its_module(self) -> None:
        """One call of a weight with a gradient of its own, and one without."""

        class Half(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(8, 8))

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = (x @ self.weight) @ self.weight.detach()
                return y

        tally = own(nn.Sequential(nn.Linear(8, 8), Half()), 4, 8)
        assert named(tally) == {reasons.NO_DGRAD: Fraction(-1, 3), "other products of *": Fraction(-1, 3)}


class TestRecomputation:
    def terms(self, tally: Tally) -> dict[str, Fraction]:
        return {term.name: term.excess for term in reasons.exact_recompute_terms(tally)}

    def test_nothing_is_recomputed(self) -> None:
        assert self.terms(built_in({})) == {}

    def test_every_second_of_three_blocks(self) -> None:
        tally = built_in({"activation_checkpoint.policy": "every_k", "model.n_layers": 3})
        forward, rows = tally.flops("forward"), 32
        down, head = 2 * rows * 32 * 16, 2 * rows * 16 * 32
        block = (forward - head) // 3
        assert self.terms(tally) == {
            reasons.NOT_RECOMPUTED: Fraction(-block, forward),
            reasons.EARLY_STOP: Fraction(-2 * down, forward),
            reasons.OUTSIDE: Fraction(-head, forward),
        }

    def test_a_users_own_checkpoint(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
                self.head = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.head(checkpoint(self.encoder, x, use_reentrant=False))
                return y

        found = self.terms(own(Model(), 4, 8))
        assert found == {reasons.EARLY_STOP: Fraction(-1, 3), reasons.OUTSIDE: Fraction(-1, 3)}


_KINDS = st.sampled_from(["forward", "dgrad", "wgrad", "recompute"])
_NAMES = st.sampled_from(["", "head", "blocks.0", "blocks.0.a", "blocks.1.a", "blocks.1.b", "encoder.layer.3.x"])
_OPS = st.sampled_from(["mm", "bmm", "_scaled_dot_product_flash_attention", "embedding"])


@given(st.dictionaries(st.tuples(_KINDS, _NAMES, _OPS), st.integers(0, 10**18)), st.booleans())
def test_whatever_is_counted_adds_up(flops: dict[tuple[Kind, str, str], int], trainable: bool) -> None:
    costs = {Place("forward", kind, name, op): Cost(n, 0, 0, 1) for (kind, name, op), n in flops.items()}
    facts = {name: ModuleFacts("Linear", 1, 4, 4 * trainable, True) for _, name, _ in flops}
    tally = Tally(costs, facts)
    forward, again = tally.flops("forward"), tally.flops("recompute")
    terms = reasons.exact_ratio_terms(tally)
    assert sum(term.excess for term in terms) == (ratio(tally) - 2 if forward else 0)
    terms = reasons.exact_recompute_terms(tally)
    assert sum(term.excess for term in terms) == (Fraction(again, forward) - 1 if forward and again else 0)
