"""The planner against an exhaustive search, and against a bound that needs none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bptool.config.block_plan import BLOCK_POLICIES
from bptool.training.block_budget import Kind, Option, Result, Selection, Times, cheapest, least_bytes

sizes = st.one_of(st.integers(0, 40), st.integers(0, 2**40))
efforts = st.integers(0, 10**4).map(float)  # no real one is a smaller part of another
several_options = st.lists(st.tuples(sizes, efforts), min_size=1, max_size=3)


@st.composite
def models(draw: st.DrawFn) -> list[Kind]:
    """Up to six blocks of up to three kinds, in any order."""
    order = draw(st.permutations(range(draw(st.integers(1, 6)))))
    cuts = sorted(draw(st.sets(st.integers(1, len(order) - 1), max_size=2))) if len(order) > 1 else []
    groups = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    return [Kind(tuple(group), options_of(draw(several_options))) for group in groups]


def options_of(pairs: Sequence[tuple[int, float]]) -> tuple[Option, ...]:
    return tuple(Option(policy, *pair) for policy, pair in zip(BLOCK_POLICIES, pairs, strict=False))


def by_exhaustion(kinds: Sequence[Kind], budget: int) -> float:
    """Every way to treat every block."""
    each = [kind.options for kind in kinds for _ in kind.blocks]
    fitting = (plan for plan in product(*each) if sum(option.n_bytes for option in plan) <= budget)
    return min(sum(option.effort for option in plan) for plan in fitting)


results = st.lists(st.tuples(st.integers(0, 2**30), st.integers(0, 10**4), st.booleans()), max_size=4)


@st.composite
def selecting_models(draw: st.DrawFn) -> list[Kind]:
    """Up to three blocks of up to two kinds, of which single results may be kept."""

    def selection() -> Selection:
        kept = [Result(f"op-{i + 1}", n, float(e), draws) for i, (n, e, draws) in enumerate(draw(results))]
        own = draw(st.integers(0, 10**3))  # besides what is computed again
        return Selection(draw(st.integers(0, 2**20)), own + sum(one.effort for one in kept), tuple(kept))

    cut, count = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = [group for group in (range(min(cut, count)), range(cut, count)) if group]
    return [Kind(tuple(group), options_of(draw(several_options)), selection()) for group in groups]


def all_options(kind: Kind) -> list[Option]:
    """Every choice of results among them, but those that random numbers forbid."""
    found = list(kind.options)
    if kind.selection is None:
        return found
    of, results = kind.selection, kind.selection.results
    for chosen in (set(c) for r in range(len(results) + 1) for c in combinations(range(len(results)), r)):
        drawing = [place for place, result in enumerate(results) if result.draws]
        first = min((place for place in drawing if place in chosen), default=len(results))
        if all(place in chosen for place in drawing if place > first):
            n_bytes = of.n_bytes + sum(results[place].n_bytes for place in chosen)
            found.append(Option("chosen", n_bytes, of.effort - sum(results[place].effort for place in chosen)))
    return found


@settings(max_examples=150, deadline=None)
@given(selecting_models(), st.floats(0, 1))
def test_no_choice_of_results_is_cheaper(kinds: list[Kind], share: float) -> None:
    each = [all_options(kind) for kind in kinds]
    most = sum(len(kind.blocks) * max(o.n_bytes for o in own) for kind, own in zip(kinds, each, strict=True))
    least = least_bytes(kinds)
    budget = least + int((most - least) * share)
    plan = cheapest(kinds, budget)
    best = by_exhaustion([Kind(kind.blocks, tuple(own)) for kind, own in zip(kinds, each, strict=True)], budget)
    assert plan.n_bytes <= budget
    assert plan.effort <= best * (1 + 1e-9) + 1e-9
    assert plan.effort * (1 - plan.gap) <= best * (1 + 1e-9) + 1e-9


def test_where_only_keeping_nothing_fits() -> None:
    """The solver takes a millionth of the budget for nothing."""
    selection = Selection(0, 1.0, (Result("op-1", 1, 1.0),))
    plan = cheapest([Kind((0, 1), (Option("none", 10**6, 0.0),), selection)], 0)
    assert (plan.policies, plan.n_bytes, plan.effort) == (("full", "full"), 0, 2.0)


def test_a_choice_by_hand() -> None:
    """Room for 7 bytes in two blocks: the result that spares most for its bytes in both, then the other one once."""
    selection = Selection(0, 10.0, (Result("mm-1", 2, 5.0), Result("mm-2", 3, 4.0), Result("add-1", 9, 1.0)))
    plan = cheapest([Kind((0, 1), (Option("none", 20, 0.0),), selection)], 7)
    assert (plan.policies, plan.n_bytes) == (("save:mm-1", "save:mm-1-2"), 7)
    assert plan.effort == 20.0 - 5 - 5 - 4
    named = replace(selection, known={frozenset({"mm-1"}): "save_matmuls"})
    assert cheapest([Kind((0,), (), named)], 2).policies == ("save_matmuls",)
    assert cheapest([Kind((0,), (), named)], 0).policies == ("full",)


def test_what_draws_after_a_result_that_drew_is_kept_with_it() -> None:
    selection = Selection(
        0, 9.0, (Result("attention-1", 1, 5.0, draws=True), Result("native_dropout-1", 4, 0.0, draws=True))
    )
    assert cheapest([Kind((0,), (), selection)], 4).policies == ("full",)
    assert cheapest([Kind((0,), (), selection)], 5).policies == ("save:attention-1.native_dropout-1",)


@settings(max_examples=150, deadline=None)
@given(models(), st.floats(0, 1))
def test_no_plan_is_cheaper(kinds: list[Kind], share: float) -> None:
    least = least_bytes(kinds)
    most = sum(len(kind.blocks) * max(option.n_bytes for option in kind.options) for kind in kinds)
    budget = least + int((most - least) * share)
    plan, best = cheapest(kinds, budget), by_exhaustion(kinds, budget)
    assert plan.n_bytes <= budget
    assert plan.effort <= best * (1 + 1e-9)
    assert plan.effort * (1 - plan.gap) <= best * (1 + 1e-9)  # the gap is an honest one
    check(kinds, plan.policies, plan.n_bytes, plan.effort)


def check(kinds: Sequence[Kind], policies: Sequence[str], n_bytes: int, effort: float) -> None:
    """The figures are those of the plan, and in each kind the first blocks hold least."""
    treated = {
        block: next(option for option in kind.options if option.policy == policies[block])
        for kind in kinds
        for block in kind.blocks
    }
    assert len(policies) == len(treated)
    assert sum(option.n_bytes for option in treated.values()) == n_bytes
    assert abs(sum(option.effort for option in treated.values()) - effort) <= 1e-9 * effort
    for kind in kinds:
        held = [treated[block].n_bytes for block in sorted(kind.blocks)]
        assert held == sorted(held)


def test_by_hand() -> None:
    """Four blocks of 10 bytes, or 1 for an effort of 6, or 4 for 1; 4 x 4 bytes cost 4, 10 + 4 + 4 + 1 cost 8."""
    options = options_of([(10, 0.0), (1, 6.0), (4, 1.0)])
    plan = cheapest([Kind((0, 1, 2, 3), options)], 20)
    third = BLOCK_POLICIES[2]
    assert (plan.policies, plan.n_bytes, plan.effort, plan.gap) == ((third,) * 4, 16, 4.0, 0.0)
    assert cheapest([Kind((0, 1, 2, 3), options)], 22).policies == (third, third, third, BLOCK_POLICIES[0])


def test_a_deep_model_is_planned_at_once() -> None:
    """126 layers in under 10 seconds: what takes time must not grow with depth."""
    pairs = [(2_000_000_017 - 300_000_001 * i, 1e12 * i * i + i) for i in range(7)]
    results = tuple(Result(f"mm-{i}", 10_000_019 * (i % 7 + 1) + i, 1e11 * (i % 5 + 1) + i) for i in range(1, 61))
    selection = Selection(100_000_007, 1e11 + sum(result.effort for result in results), results)
    start = time.perf_counter()
    plan = cheapest([Kind(tuple(range(126)), options_of(pairs), selection)], 126 * 700_000_003)
    assert time.perf_counter() - start < 10
    assert len(plan.policies) == 126
    assert plan.gap < 1e-6


def test_published_arithmetic() -> None:
    """Korthikanti et al. 2022, table 4: a layer of the 22B model takes 7.7 ms forward and 11.9 ms backward; recomputed
    as a whole its backward takes 19.6 ms, and both together 39% longer."""
    layer = Times(forward=7.7, backward=11.9)
    full = Option("full", 2, layer.forward)
    model = Kind(tuple(range(48)), (Option("none", 34, 0.0), full))
    again = Times(48 * layer.forward, 48 * layer.backward, cheapest([model], 48 * 2).effort)
    assert again.backward_and_again / 48 == pytest.approx(19.6)
    assert round(again.overhead, 2) == 0.39
    # With room for half of the layers, half as much.
    half = Times(again.forward, again.backward, cheapest([model], 24 * 2 + 24 * 34).effort)
    assert half.overhead == pytest.approx(again.overhead / 2)
    assert layer + layer == Times(15.4, 23.8)
