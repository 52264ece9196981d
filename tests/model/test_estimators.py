"""Straight-through and score-function gradients beside their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical

import bptool
from bptool import score_function, straight_through

forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, at its first use
X = torch.tensor([0.3, -1.7, 2.5], dtype=torch.float64)


class TestStraightThrough:
    def test_a_function(self) -> None:
        x = X.clone().requires_grad_()
        y = straight_through(torch.round)(x)
        assert y.tolist() == [0.0, -2.0, 2.0]
        (y * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [1.0, 10.0, 100.0]

    def test_two_values(self) -> None:
        """The soft value's own chain goes on behind it, and the hard one gets nothing."""
        x, hard = X.clone().requires_grad_(), torch.sign(X).requires_grad_()
        y = straight_through(hard, F.hardtanh(x))
        assert y.tolist() == [1.0, -1.0, 1.0]
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [1.0, 0.0, 0.0]  # 1 within [-1, 1]
        assert hard.grad is None

    def test_the_hard_value_is_a_copy_in_the_soft_ones_dtype(self) -> None:
        hard = torch.tensor([1, 0])
        y = straight_through(hard, torch.zeros(2, dtype=torch.float16, requires_grad=True))
        assert y.dtype == torch.float16
        same = torch.ones(2)
        z = straight_through(same, torch.zeros(2, requires_grad=True))
        with torch.no_grad():
            z.add_(1)
        assert same.tolist() == [1.0, 1.0]

    @forward_mode
    def test_forward_mode_vmap_and_a_second_derivative(self) -> None:
        def square(x: Tensor) -> Tensor:
            return straight_through(torch.round)(x).square().sum()

        slope = torch.func.jvp(square, (X,), (torch.ones_like(X),))[1]
        assert float(slope) == float((2 * X.round()).sum())
        batched = torch.func.vmap(torch.func.grad(square))(torch.stack([X, X + 1]))
        assert torch.equal(batched, 2 * torch.stack([X, X + 1]).round())
        assert torch.equal(torch.func.hessian(square)(X), 2 * torch.eye(3, dtype=torch.float64))

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match=r"the hard value is \[2\] and the soft one \[3\]"):
            straight_through(torch.ones(2), torch.ones(3))
        with pytest.raises(ValueError, match="needs a soft one"):
            straight_through(torch.ones(2))  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="a function alone"):
            straight_through(torch.round, torch.ones(2))  # type: ignore[call-overload]


class TestScoreFunction:
    @settings(deadline=None)
    @given(st.lists(st.floats(-5, 5), min_size=2, max_size=5), st.floats(-3, 3))
    def test_the_gradient_is_advantage_times_the_slope_of_the_log_probability(
        self, costs: list[float], baseline: float
    ) -> None:
        cost = torch.tensor(costs, dtype=torch.float64, requires_grad=True)
        log_p = torch.zeros(len(costs), dtype=torch.float64, requires_grad=True)
        result = score_function(cost, log_p, baseline)
        assert torch.equal(result, cost)
        result.mean().backward()
        assert cost.grad is not None
        assert log_p.grad is not None
        torch.testing.assert_close(cost.grad, torch.full_like(cost, 1 / len(costs)))
        torch.testing.assert_close(log_p.grad, (cost.detach() - baseline) / len(costs))

    def test_leave_one_out(self) -> None:
        cost = torch.tensor([1.0, 2.0, 6.0])
        log_p = torch.zeros(3, requires_grad=True)
        score_function(cost, log_p, "leave-one-out").sum().backward()
        assert log_p.grad is not None
        assert log_p.grad.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5]  # the means of the other two

    def test_its_mean_over_all_choices_is_the_gradient_of_the_mean(self) -> None:
        """By enumeration, in the closed form of a softmax: p * (cost - mean cost)."""
        logits = torch.tensor([0.2, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
        costs = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
        choice = Categorical(logits=logits)
        k = torch.arange(4)
        p = choice.probs.detach()
        (p * score_function(costs[k], choice.log_prob(k), 0.7)).sum().backward()
        expected = p * (costs - (p * costs).sum())
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)

    @forward_mode
    def test_forward_mode(self) -> None:
        cost, log_p, tangents = X, X - 1, (torch.ones_like(X), 2 * torch.ones_like(X))
        slope = torch.func.jvp(lambda c, p: score_function(c, p, 0.5), (cost, log_p), tangents)[1]
        torch.testing.assert_close(slope, 1 + (cost - 0.5) * 2)

    def test_a_second_derivative_is_refused(self) -> None:
        log_p = torch.zeros(2, requires_grad=True)
        weight = torch.ones((), requires_grad=True)
        result = weight * score_function(torch.ones(2), log_p).sum()
        (slope,) = torch.autograd.grad(result, log_p, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match=r"cost is \[2\] and log_probability \[3\]"):
            score_function(torch.ones(2), torch.ones(3))
        with pytest.raises(ValueError, match="two samples or more"):
            score_function(torch.ones(1), torch.ones(1), "leave-one-out")


def test_they_are_part_of_the_public_face() -> None:
    assert {"straight_through", "score_function"} <= set(bptool.__all__)
