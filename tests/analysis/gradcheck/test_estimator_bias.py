"""Estimators beside the truth: closed forms of what they are off by."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from bptool import score_function, straight_through
from bptool.analysis.gradcheck.choices import all_paths
from bptool.analysis.gradcheck.estimators import EstimatorCheck, check_estimators, estimators_between

LOGITS = [0.2, -1.0, 0.7, 0.1]
W = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def leaf(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def checked(function: Callable[[], Tensor], tensor: Tensor, **options: int) -> EstimatorCheck:
    def run(seed: int) -> Tensor:
        torch.default_generator.manual_seed(seed)
        return function()

    before = tensor.detach().clone()
    (found,) = check_estimators(run, {"theta": tensor}, seed=5, **options)
    assert torch.equal(tensor, before)
    assert tensor.grad is None
    return found


def softmax_slope(p: Tensor) -> Tensor:
    return torch.diag(p) - torch.outer(p, p)


class TestStraightThrough:
    def one_hot(self, theta: Tensor, cost: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def function() -> Tensor:
            p = theta.softmax(-1)
            hard = F.one_hot(Categorical(probs=p).sample(), len(p)).to(p.dtype)
            return cost(straight_through(hard, p))

        return function

    def test_a_categorical_choice(self) -> None:
        """f(e) = (w e)^2. Truth: J w^2, as f(e_k) = w_k^2; straight-through: J E[2 (w e) w] = 2 (w p) J w."""
        theta = leaf(LOGITS)
        p = theta.detach().softmax(-1)
        truth = softmax_slope(p) @ W.square()
        estimate = 2 * (W @ p) * (softmax_slope(p) @ W)
        found = checked(self.one_hot(theta, lambda e: (W @ e).square()), theta)
        assert (found.estimator, found.method) == ("straight_through", "enumeration")
        assert found.relative_bias == pytest.approx(float((estimate - truth).norm() / truth.norm()), rel=1e-7)
        assert found.cosine == pytest.approx(float(F.cosine_similarity(estimate, truth, dim=0)), rel=1e-7)
        assert found.bias_interval == 0
        assert found.unbiased is False
        assert "biased" in found.detail

    def test_it_is_unbiased_where_the_cost_is_linear(self) -> None:
        theta = leaf(LOGITS)
        found = checked(self.one_hot(theta, lambda e: W @ e), theta)
        assert found.unbiased is True
        assert found.relative_bias is not None
        assert found.relative_bias < 1e-8

    @pytest.mark.parametrize("target", [0.1, 0.45, 0.9])
    def test_a_stochastic_binary_neuron(self, target: float) -> None:
        """Bengio et al. 2013: p = sigmoid(a), h ~ p, cost (h - t)^2. Truth: p' (1 - 2t); estimate: 2 p' (p - t)."""
        theta = leaf([0.4])

        def function() -> Tensor:
            p = theta.sigmoid()
            return (straight_through(Bernoulli(probs=p).sample(), p) - target).square().sum()

        p = float(theta.detach().sigmoid())
        found = checked(function, theta)
        assert found.relative_bias == pytest.approx(abs(2 * (p - target) / (1 - 2 * target) - 1), rel=1e-6)

    def test_rounding(self) -> None:
        """Smoothed by noise as large as the step, against the sum over whole numbers of their probability."""
        x, target, weight = 0.3, -1.2, 1.5
        sigma = abs(round(weight * x) - weight * x)

        def mean(x: float) -> float:
            def below(edge: float) -> float:
                return math.erf((edge - weight * x) / sigma / math.sqrt(2)) / 2

            return math.fsum((n - target) ** 2 * (below(n + 0.5) - below(n - 0.5)) for n in range(-9, 10))

        truth = (mean(x + 1e-6) - mean(x - 1e-6)) / 2e-6
        estimate = 2 * (round(weight * x) - target) * weight
        theta = leaf([x])
        found = checked(lambda: (straight_through(torch.round)(weight * theta) - target).square().sum(), theta)
        assert found.method == "smoothing"
        assert found.relative_bias is not None
        assert found.bias_interval is not None
        assert abs(found.relative_bias - abs(estimate - truth) / abs(truth)) <= 1.1 * found.bias_interval
        assert found.bias_interval < 0.2

    def test_two_hard_steps_one_after_the_other(self) -> None:
        """The second one's input depends on the first one's noise."""
        theta = leaf([0.3, 0.8])
        hard = straight_through(torch.round)
        found = checked(lambda: (hard(1.4 * hard(theta) + theta) - 0.3).square().sum(), theta)
        assert found.method == "smoothing"
        assert found.cosine is not None

    def test_what_has_no_truth(self) -> None:
        theta = leaf([0.3])
        found = checked(lambda: straight_through(theta.round(), theta).sum(), theta)
        assert (found.method, found.relative_bias) == ("unknown", None)
        assert "not the function that makes it" in found.detail

        def by_uniform_numbers() -> Tensor:
            p = theta.sigmoid()
            return straight_through((torch.rand(1) < p).double(), p).sum()

        found = checked(by_uniform_numbers, theta)
        assert "by other means than torch.multinomial and torch.bernoulli" in found.detail


class TestScoreFunction:
    def sampled(self, theta: Tensor, baseline: object, samples: int = 4, level: float = 0.0) -> Callable[[], Tensor]:
        def function() -> Tensor:
            choice = Categorical(logits=theta)
            k = choice.sample((samples,))
            cost = W.square()[k] + level
            found = baseline(cost) if callable(baseline) else baseline
            return score_function(cost, choice.log_prob(k), found).mean()  # type: ignore[arg-type]

        return function

    @pytest.mark.parametrize("baseline", [0.0, 2.0, "leave-one-out"])
    def test_it_is_unbiased_whatever_the_baseline(self, baseline: object) -> None:
        theta = leaf(LOGITS)
        found = checked(self.sampled(theta, baseline, samples=2), theta, most_evaluations=2000)
        assert (found.estimator, found.method) == ("score_function", "enumeration")
        assert found.unbiased is True
        assert found.relative_bias is not None
        assert found.bias_interval is not None
        assert found.relative_bias < found.bias_interval < 0.5
        assert "unbiased as far as that shows" in found.detail

    @pytest.mark.parametrize("wrong", [lambda cost: 0.3 * cost, lambda cost: cost.mean()])
    def test_a_baseline_that_knows_its_own_sample_is_biased(self, wrong: Callable[[Tensor], Tensor]) -> None:
        """Of two samples the mean takes away half of the gradient."""
        theta = leaf(LOGITS)
        found = checked(self.sampled(theta, wrong, samples=2), theta, most_evaluations=2000)
        assert found.unbiased is False

    def test_the_variance_is_the_closed_form(self) -> None:
        """Of one sample, sum_k p_k (cost_k - b)^2 |e_k - p|^2 - |g|^2, with a baseline and without."""
        theta = leaf(LOGITS)
        p = theta.detach().softmax(-1)
        costs, away = W.square() + 10, (torch.eye(4, dtype=torch.float64) - p).square().sum(1)
        squared = float((softmax_slope(p) @ costs).square().sum())
        level = float(p @ costs)
        found = checked(self.sampled(theta, level, samples=1, level=10.0), theta, most_evaluations=8000)
        for variance, baseline in ((found.variance, level), (found.variance_without_baseline, 0.0)):
            expected = (float((p * (costs - baseline).square() * away).sum()) - squared) / squared
            assert variance == pytest.approx(expected, rel=0.1)
        assert found.variance is not None
        assert found.variance_without_baseline is not None
        assert found.variance < found.variance_without_baseline / 5

    def test_too_many_paths_are_drawn(self) -> None:
        """4^40 of them; the truth is J w^2 all the same."""
        theta = leaf(LOGITS)
        found = checked(self.sampled(theta, "leave-one-out", samples=40), theta, most_evaluations=5000)
        assert found.method == "sampling"
        assert found.unbiased is True
        assert found.bias_interval is not None
        assert found.bias_interval > 0

    def test_two_draws_of_which_the_second_depends_on_the_first(self) -> None:
        theta = leaf([0.3, -0.4])

        def function() -> Tensor:
            first = Bernoulli(logits=theta[0])
            a = first.sample()
            second = Bernoulli(logits=theta[1] * (1 + a))
            b = second.sample()
            return score_function((a - 2 * b + 0.3).square(), first.log_prob(a) + second.log_prob(b), 1.0)

        assert checked(function, theta).unbiased is True
        assert [round(path.probability, 12) for path in all_paths(function)] == pytest.approx(
            [
                (1 - s(0.3)) * (1 - s(-0.4)),
                (1 - s(0.3)) * s(-0.4),
                s(0.3) * (1 - s(-0.8)),
                s(0.3) * s(-0.8),
            ]
        )

    def test_what_the_cost_depends_on_itself_is_no_estimate(self) -> None:
        theta, weight = leaf(LOGITS), leaf([2.0])
        choice = Categorical(logits=theta)
        k = torch.tensor([1, 3])
        result = score_function(weight * W[k], choice.log_prob(k)).mean()
        assert estimators_between(result, theta) == ["score_function"]
        assert estimators_between(result, weight) == []


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_whose_gradient_is_an_estimate() -> None:
    x, y, z = leaf([0.3]), leaf([0.4]), leaf([0.5])
    result = (straight_through(torch.round)(x * y) + y * z).sum()
    assert [estimators_between(result, each) for each in (x, y, z)] == [["straight_through"], ["straight_through"], []]
    assert estimators_between(x.detach(), x) == []


class TestPaths:
    def test_draws_without_replacement(self) -> None:
        """By hand: 3 of 2 in order, p_i p_j / (1 - p_i)."""
        weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
        paths = list(all_paths(lambda: torch.multinomial(weights, 2).double().sum()))
        p = weights / 8
        expected = {(i, j): float(p[i] * p[j] / (1 - p[i])) for i in range(3) for j in range(3) if i != j}
        assert {path.taken: path.probability for path in paths} == pytest.approx(expected)

    def test_what_is_impossible_is_left_out(self) -> None:
        p = torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
        paths = list(all_paths(lambda: torch.multinomial(p, 1).double().sum()))
        assert [(path.taken, path.probability) for path in paths] == [((1, 0), 0.5), ((1, 1), 0.5)]
        assert [float(path.value) for path in paths] == [1.0, 2.0]

    def test_a_function_that_draws_nothing_has_one(self) -> None:
        (path,) = all_paths(lambda: torch.ones(()))
        assert (path.taken, path.probability) == ((), 1.0)
