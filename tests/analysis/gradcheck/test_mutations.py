"""Bugs that are put into a target's own backward: each is a real one, and what is said of it is what the check does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import broken_backwards as hand
import pytest
import torch
import torch.nn.functional as F
from gradient_checks import eye
from torch import Tensor, nn

from bptool import GradientTarget
from bptool.analysis.gradcheck.check import Examined, examine
from bptool.analysis.gradcheck.further import with_mutations
from bptool.analysis.gradcheck.mutation.calls import (
    CallSite,
    DoesNotApplyError,
    Exchange,
    call_sites,
    gradients_with_formula,
)
from bptool.analysis.gradcheck.mutation.catching import Eye
from bptool.analysis.gradcheck.mutation.check import COUNT, mutations
from bptool.analysis.gradcheck.mutation.formulas import FORMULA_BUGS, FormulaBug
from bptool.analysis.gradcheck.mutation.gradients import GRADIENT_BUGS, GradientBug
from bptool.analysis.gradcheck.mutation.graph import gradients_with, sites
from bptool.analysis.gradcheck.mutation.products import PRODUCT_BUGS
from bptool.analysis.gradcheck.mutation.record import MutationCheck
from bptool.analysis.gradcheck.subject import Gradients, Subject
from bptool.analysis.gradcheck.verdicts import Verdicts

FORMULAS = (*FORMULA_BUGS, *PRODUCT_BUGS)


class Everything(nn.Module):
    """A model that calls every function whose derivative has a known bug. B 3, T 5, H 2, width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 8))
        self.scale, self.shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.linear = nn.Linear(8, 8)
        self.last = nn.Linear(8, 7)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = F.embedding(ids, self.table)
        x = F.layer_norm(x, (8,), self.scale, self.shift, 1e-3)
        q, k, v = (self.linear(x * factor).unflatten(-1, (2, 4)).transpose(1, 2) for factor in (0.5, 0.7, 1.1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = F.rms_norm(x, (8,), self.scale, 1e-3)
        x = F.gelu(x) + F.silu(self.linear(x)) * torch.tanh(x)
        x = F.dropout(x.sigmoid() + F.relu(x), 0.3) + (0.1 * x).exp()
        x = x + torch.softmax(x, -1)
        return F.cross_entropy(self.last(x).flatten(0, 1), targets.flatten())


def everything() -> GradientTarget:
    torch.manual_seed(0)
    return GradientTarget(Everything(), (torch.randint(7, (3, 5)), torch.randint(7, (3, 5))))


@pytest.fixture(scope="module")
def examined() -> Examined:
    return examine(everything(), seed=2)


@pytest.fixture(scope="module")
def found(examined: Examined) -> dict[str, MutationCheck]:
    result = with_mutations(examined.result, examined, lambda done, of: None)
    assert result.mutations is not None
    return {one.name: one for one in result.mutations}


def same(a: Gradients, b: Gradients) -> bool:
    def near(x: Tensor | None, y: Tensor | None) -> bool:
        zero = torch.zeros((), dtype=torch.float64)
        left, right = torch.broadcast_tensors(zero if x is None else x, zero if y is None else y)
        return torch.allclose(left, right, rtol=1e-9, atol=1e-14)

    return all(near(a[name], b[name]) for name in a)


Made = Callable[..., Tensor]
IDS, TARGETS = torch.tensor([[0, 3, 3], [1, 0, 4]]), torch.tensor([0, 2, 1])


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, (6,), scale, shift)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def lookup(table: Tensor) -> Tensor:
    return F.embedding(IDS, table)


def loss(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, TARGETS)


def gated(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


NAMES_OF: dict[Made, set[str]] = {
    layer_norm: {"layer_norm"},
    causal_attention: {"scaled_dot_product_attention"},
    lookup: {"embedding"},
    loss: {"cross_entropy"},
    gated: {"silu"},
    F.gelu: {"gelu"},
    torch.add: {"add"},
    torch.tanh: {"tanh"},
    torch.sigmoid: {"sigmoid"},
}


def constant_statistics(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    with torch.no_grad():
        mean, inverse = x.mean(-1, keepdim=True), (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    return (x - mean) * inverse * scale + shift


def planted(function: Any, bug: str, *before: Tensor, after: Sequence[Tensor] = ()) -> Made:
    """An operation of the tests' own block, whose backward is written by hand, with that bug."""
    return lambda *given: function.apply(*before, *given, *after, bug)


NORM, ATTENTION = [(4, 6), (6,), (6,)], [(2, 2, 5, 4)] * 3
BY_HAND: dict[str, tuple[str, Sequence[tuple[int, ...]], Made, Made]] = {
    bug: (bug.partition(": ")[2], shapes, function, planted(owner, bug))
    for owner, shapes, function, bugs in (
        (
            hand.LayerNorm,
            NORM,
            layer_norm,
            (
                *("layer norm: variance's term dropped", "layer norm: mean's term dropped"),
                *("layer norm: scale forgotten", "layer norm: scale's gradient of the raw input"),
            ),
        ),
        (hand.Gelu, [(5, 4)], F.gelu, ("gelu: density's term dropped",)),
        (hand.SwiGLU, [(5, 4), (5, 4)], gated, ("swiglu: derivative is the sigmoid alone",)),
        (
            hand.Attention,
            ATTENTION,
            causal_attention,
            (
                *("attention: scale dropped in dQ", "attention: scale applied twice in dK"),
                *("attention: dV with P not transposed", "attention: scores detached"),
            ),
        ),
        (hand.Residual, [(3, 4), (3, 4)], torch.add, ()),
    )
    for bug in bugs
}
BY_HAND |= {
    "layer norm: eps": (
        "eps 10 times too large",
        NORM,
        layer_norm,
        lambda x, scale, shift: F.layer_norm(x, (6,), scale, shift, 1e-4),
    ),
    "layer norm: n - 1": (
        "variance over n - 1",
        NORM,
        layer_norm,
        lambda x, scale, shift: (x - x.mean(1, True)) / (x.var(1, keepdim=True) + 1e-5).sqrt() * scale + shift,
    ),
    "layer norm: statistics": ("statistics taken for constants", NORM, layer_norm, constant_statistics),
    "gelu: other form": (
        "derivative of the other form (tanh, erf)",
        [(5, 4)],
        F.gelu,
        planted(hand.Gelu, "gelu: derivative of the tanh form"),
    ),
    "attention: sum": (
        "softmax's sum dropped",
        ATTENTION,
        causal_attention,
        planted(hand.Attention, "attention: sum's term dropped"),
    ),
    "residual: detached": ("second branch detached", [(3, 4)] * 2, torch.add, lambda x, y: x + y.detach()),
    "residual: twice": ("second branch counted twice", [(3, 4)] * 2, torch.add, lambda x, y: x + 2 * y),
    "embedding: off by one": (
        "ids off by one",
        [(5, 4)],
        lookup,
        planted(hand.Embedding, "embedding: ids off by one", IDS),
    ),
    "embedding: repeated": (
        "repeated ids overwrite each other",
        [(5, 4)],
        lookup,
        planted(hand.Embedding, "embedding: repeated ids overwrite each other", IDS),
    ),
    "loss: sum": (
        "sum for the mean",
        [(3, 5)],
        loss,
        planted(hand.Loss, "loss: sum for a mean", after=[TARGETS]),
    ),
    "loss: targets": ("targets off by one", [(3, 5)], loss, lambda scores: F.cross_entropy(scores, (TARGETS + 1) % 5)),
    "loss: one-hot": (
        "one-hot forgotten",
        [(3, 5)],
        loss,
        lambda scores: (scores.softmax(1).detach() * scores).sum() / 3,
    ),
    "tanh": ("1 - y for 1 - y^2", [(3, 5)], torch.tanh, lambda x: x * (1 - x.tanh().detach())),
    "sigmoid": ("y for y (1 - y)", [(3, 5)], torch.sigmoid, lambda x: x * x.sigmoid().detach()),
}


class TestTheBugs:
    def test_there_are_enough_and_each_has_its_name(self) -> None:
        names = [(bug.name, ()) for bug in GRADIENT_BUGS] + [(bug.name, bug.ops) for bug in FORMULAS]
        assert len(names) == len(set(names)) == COUNT >= 30

    @pytest.mark.parametrize("bug", GRADIENT_BUGS, ids=lambda bug: bug.name)
    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (5, 5), (4, 3), (6,), (), (1, 1)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    def test_a_gradient_is_changed_where_it_fits_and_the_right_one_is_left_alone(
        self, bug: GradientBug, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        if not bug.fits(shape):
            return
        torch.manual_seed(1)
        right = torch.randn(shape, dtype=dtype)
        before = right.clone()
        wrong = bug.change(right)
        assert torch.equal(right, before)
        assert (wrong.shape, wrong.dtype) == (right.shape, right.dtype)
        alone = bug.of_previous_call or bug.name == "small values flushed to zero"
        assert alone or right.numel() < 4 or not torch.allclose(wrong, right, rtol=1e-10, atol=0)

    @pytest.mark.parametrize("bug", FORMULAS, ids=lambda bug: bug.name)
    def test_a_value_stays_what_it_is(self, bug: FormulaBug, examined: Examined) -> None:
        subject = examined.subject
        value, right = subject.gradient()
        for site in call_sites(subject, set(bug.ops)):
            try:
                wrong = gradients_with_formula(subject, site, bug.formula)
            except DoesNotApplyError:
                continue
            assert not same(wrong, right)
            assert _value_with(subject, site, bug) == value
            return
        pytest.fail("it applies nowhere")

    @pytest.mark.parametrize(("name", "shapes", "function", "by_hand"), BY_HAND.values(), ids=BY_HAND)
    def test_beside_backwards_written_by_hand(
        self, name: str, shapes: Sequence[tuple[int, ...]], function: Made, by_hand: Made
    ) -> None:
        torch.manual_seed(0)
        inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        bug = next(bug for bug in FORMULAS if bug.name == name and bug.ops[0] in NAMES_OF[function])
        subject = Subject(GradientTarget(lambda *given: function(*given), inputs), seed=0)
        (site,) = call_sites(subject, set(bug.ops))
        wrong = gradients_with_formula(subject, site, bug.formula)
        (weight,) = subject.output_weights()
        expected = torch.autograd.grad(by_hand(*inputs), inputs, weight, allow_unused=True, materialize_grads=True)
        assert same(wrong, dict(zip(wrong, expected, strict=True)))

    def test_a_head_by_hand(self) -> None:
        """One head's part of the gradient is zero, the other's is what it was."""
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
        subject = Subject(GradientTarget(F.scaled_dot_product_attention, (q, k, v)), seed=0)
        _, right = subject.gradient()
        (site,) = call_sites(subject, {"scaled_dot_product_attention"})
        (bug,) = (bug for bug in PRODUCT_BUGS if bug.name == "one head forgotten")
        wrong = gradients_with_formula(subject, site, bug.formula)
        for name, gradient in wrong.items():
            good = right[name]
            assert gradient is not None
            assert good is not None
            assert not gradient[:, 0].any()
            assert torch.allclose(gradient[:, 1], good[:, 1], rtol=1e-12)


def _value_with(subject: Subject, site: CallSite, bug: FormulaBug) -> float:
    with Exchange(site, bug.formula):
        return float(subject.scalar(subject.outputs()).item())


class TestWhatIsSaid:
    def test_all_are_made_and_caught(self, found: dict[str, MutationCheck], examined: Examined) -> None:
        """But for what float32 rounds away by less than the check claims to see: that depends on the CPU."""
        assert examined.result.passed
        assert {one.outcome for one in found.values()} <= {"caught", "missed"}
        missed = {name: one for name, one in found.items() if one.outcome == "missed"}
        assert set(missed) <= {"weight gradient of inputs in float32", "rounded to float32"}
        for one in missed.values():
            assert one.relative_error is not None
            assert one.detectable_relative_error is not None
            assert one.relative_error < one.detectable_relative_error
        assert len({one.op for one in found.values()}) > 15

    @pytest.mark.parametrize(
        "bugs", [GRADIENT_BUGS[::6], pytest.param(GRADIENT_BUGS, marks=pytest.mark.slow)], ids=["some", "all"]
    )
    def test_the_whole_check_says_the_same(self, bugs: Sequence[GradientBug], examined: Examined) -> None:
        """The differences that are there already stand for a check from the beginning."""
        subject, verdicts = examined.subject, examined.verdicts
        assert verdicts is not None
        judge = eye(examined)
        for number, bug in enumerate(bugs):
            if bug.of_previous_call:  # another point makes it, not `change`
                continue
            fitting = [site for site in sites(subject) if bug.fits(site.shape)]
            order = fitting[number % len(fitting) :] + fitting[: number % len(fitting)]
            # At some places a bug changes nothing, as a mean that is zero already.
            site = next(site for site in order if judge.sees(gradients_with(subject, site, bug.change)).changed)
            for size in (1.0, 1e-13):  # as it is, and too small to be seen

                def changed(right: Tensor, size: float = size, bug: GradientBug = bug) -> Tensor:
                    return right + size * (bug.change(right) - right)

                wrong = gradients_with(subject, site, changed)
                caught = judge.sees(wrong)
                whole = Verdicts(subject, wrong, wrong, verdicts.noise)
                assert caught.seen == any(tensor.verdict == "wrong" for tensor in whole.each()), (bug.name, site, size)
                assert caught.seen == (size == 1.0 or not caught.finite), (bug.name, site, size)

    @pytest.mark.parametrize("factor", [3.0, 1e-3])
    def test_what_is_claimed_to_be_caught_is(self, examined: Examined, factor: float) -> None:
        subject = examined.subject
        _, right = subject.gradient()
        generator = torch.Generator().manual_seed(5)
        for tensor in examined.result.tensors:
            good, seen = right[tensor.name], tensor.detectable_relative_error
            assert good is not None
            assert seen is not None
            error = torch.randn(good.shape, generator=generator, dtype=good.dtype)
            wrong = {**right, tensor.name: good + error * (factor * seen * good.norm() / error.norm())}
            caught = eye(examined).sees(wrong)
            assert caught.seen == (factor > 1)
            if caught.changed:
                assert caught.tensor == tensor.name
                assert caught.relative_error == pytest.approx(factor * seen, rel=1e-2)

    def test_the_right_gradient_is_no_bug(self, examined: Examined) -> None:
        _, right = examined.subject.gradient()
        assert eye(examined).sees(right).changed == ()
        assert not eye(examined).sees(right).seen

    def test_a_gradient_that_is_missing_is_zero(self, examined: Examined) -> None:
        _, right = examined.subject.gradient()
        caught = eye(examined).sees({**right, "last.bias": None})
        assert (caught.seen, caught.tensor) == (True, "last.bias")
        assert caught.relative_error == pytest.approx(1.0)

    def test_a_check_that_is_blind_is_said_to_be(self, examined: Examined) -> None:
        verdicts = examined.verdicts
        assert verdicts is not None
        looks = [replace(look, measured=replace(look.measured, error_bar=1e9)) for look in verdicts.looks]
        detectable = {t.name: t.detectable_relative_error for t in examined.result.tensors}
        blind = mutations(examined.subject, Eye(verdicts.directions, looks, detectable))
        outcomes = {one.name: one.outcome for one in blind}
        assert outcomes["wrong sign"] == "missed"
        assert [name for name, outcome in outcomes.items() if outcome == "caught"] == ["one element NaN"]
        (sign,) = (one for one in blind if one.name == "wrong sign")
        assert "though the check claims to catch" in sign.detail

    def test_the_same_seed_makes_the_same_bugs(self, found: dict[str, MutationCheck]) -> None:
        again = examine(everything(), seed=2)
        result = with_mutations(again.result, again, lambda done, of: None)
        assert result.mutations is not None
        for one, other in zip(result.mutations, found.values(), strict=True):
            figures = ("relative_error", "detectable_relative_error")  # sums may be rounded otherwise
            assert one.model_dump(exclude=set(figures)) == other.model_dump(exclude=set(figures))
            for figure in figures:
                assert (getattr(one, figure) or 0) == pytest.approx(getattr(other, figure) or 0, rel=1e-6)

    def test_random_state_is_as_it_was(self, examined: Examined) -> None:
        before = torch.get_rng_state()
        with_mutations(examined.result, examined, lambda done, of: None)
        assert torch.equal(torch.get_rng_state(), before)
