"""`assert_gradients`: what it returns, and what its message says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gradient_checks import random_input
from identity_checks import SquaresOnce
from torch import nn

from bptool import GradientTarget, Workload, assert_gradients


class TestAssertion:
    def test_it_returns_the_result(self) -> None:
        assert assert_gradients(nn.Linear(3, 2), (torch.randn(4, 3),)).passed
        assert assert_gradients(GradientTarget(torch.sin, random_input(3)), seed=4).seed == 4

    def test_its_message_has_the_verdicts(self) -> None:
        with pytest.raises(AssertionError, match=r"x \[3\]: wrong: relative error 5\.00e-01") as caught:
            assert_gradients(lambda x: x * x.detach(), random_input(3), seed=8)
        assert "seed=8" in str(caught.value)

    def test_identities_are_asserted_too(self) -> None:
        """A backward that reads what was saved twice: its gradient is right, and it cannot be recomputed."""

        def workload(make: Callable[[], nn.Module]) -> Workload:
            return Workload(
                model=make,
                batch=lambda generator: torch.randn(4, 3, generator=generator),
                loss=lambda model, batch: model(batch).square().mean(),
            )

        right = assert_gradients(workload(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))), seed=1)
        assert "accumulation" in {identity.name for identity in right.identities}
        with pytest.raises(AssertionError, match="identity activation_checkpointing: ") as caught:
            assert_gradients(workload(lambda: nn.Sequential(SquaresOnce(), SquaresOnce())), seed=1)
        assert str(caught.value).splitlines()[0].endswith(": identity activation_checkpointing")

    def test_identities_of_a_function(self) -> None:
        targets = torch.tensor([0, 2, 1])
        result = assert_gradients(lambda x: nn.functional.cross_entropy(x, targets), random_input(3, 4))
        assert [identity.name for identity in result.identities] == ["logits_gradient"]
        assert result.cost.identities_s > 0
