"""How near two computations of the same numbers must come."""

from __future__ import annotations

import math

import pytest
import torch

from bptool.analysis.gradcheck.identities.identity import agree, agree_as_one


class TestAgreement:
    def test_one_element_of_many(self) -> None:
        expected = torch.ones(1000, 1000, dtype=torch.float64)
        actual = expected.clone()
        actual[7, 5] += 1e-10
        found = agree(actual, expected, 1e-12 * expected, "here")
        assert not found.holds
        assert "at [7, 5]" in found.where
        assert found.relative_error == pytest.approx(1e-13, rel=1e-3)
        assert agree(actual, expected, 2e-10 * expected, "here").holds

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_does_not_agree(self, value: float) -> None:
        expected = torch.ones(3)
        actual = torch.tensor([1.0, value, 1.0])
        assert not agree(actual, expected, expected, "here").holds
        assert not agree_as_one({"a": actual}, {"a": expected}, 1.0).holds

    def test_below_the_smallest_normal_numbers_nothing_is_compared(self) -> None:
        expected = torch.tensor([1e-310, 1.0], dtype=torch.float64)
        actual = torch.tensor([2e-310, 1.0], dtype=torch.float64)
        assert agree(actual, expected, torch.zeros_like(expected), "here").holds
        assert not agree(1e200 * actual, 1e200 * expected, torch.zeros_like(expected), "here").holds

    def test_a_gradient_that_is_missing_is_zero(self) -> None:
        one = torch.ones(4)
        assert agree_as_one({"a": None}, {"a": torch.zeros(4)}, 0.0).holds
        assert agree_as_one({"a": None, "b": one}, {"a": one, "b": one}, 0.1).relative_error == pytest.approx(0.5**0.5)
