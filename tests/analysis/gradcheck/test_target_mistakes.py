"""What is wrong with the target itself: told by its cause and its line, before anything is judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_checks import checked, only, random_input
from torch import Tensor, nn

from bptool.errors import TargetError


class TestMistakes:
    def error(self, function: Callable[..., Any], *inputs: Any) -> TargetError:
        with pytest.raises(TargetError) as caught:
            checked(function, *inputs)
        return caught.value

    def test_nothing_to_check(self) -> None:
        assert "nothing to check" in self.error(torch.sin, torch.randn(3)).message

    def test_no_tensor(self) -> None:
        for function in (lambda x: 3.0, lambda x: x.argmax(), lambda x: x.sum().item()):
            assert "returns no floating point" in self.error(function, random_input(3)).message

    def test_changed_inputs(self) -> None:
        def scales(x: Tensor, y: Tensor) -> Tensor:
            y.mul_(2)
            return x * y

        assert "its input y" in self.error(scales, random_input(3), torch.randn(3)).message
        assert "in place" in self.error(lambda x: x.mul_(2), random_input(3)).message

    def test_a_changed_parameter(self) -> None:
        class Normalises(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    self.weight /= self.weight.norm()
                return super().forward(x)

        assert "its parameter weight" in self.error(Normalises(3, 2), torch.randn(4, 3)).message

    def test_a_refused_change_names_the_users_line(self) -> None:
        def doubled(x: Tensor) -> Tensor:
            return x.mul_(2)

        message = self.error(doubled, random_input(3)).message
        assert "a parameter or input that requires a gradient" in message
        assert "in doubled)" in message

    def test_parameters_without_a_shape(self) -> None:
        error = self.error(nn.LazyLinear(2), torch.randn(4, 3))
        assert "no shape before its first call: weight, bias" in error.message
        assert "call it once" in error.remedy

    def test_a_constant_that_is_not_float64(self) -> None:
        constant = torch.randn(3, 3)
        error = self.error(lambda x: x @ constant, random_input(2, 3))
        assert "does not run in float64" in error.message
        assert "dtype=x.dtype" in error.remedy

    def test_a_backward_that_raises(self) -> None:
        error = self.error(lambda x: x // 0.1, random_input(3))
        assert "the target's backward raised RuntimeError: derivative for aten::floor_divide" in error.message

    def test_an_error_of_its_own_stays_its_own(self) -> None:
        with pytest.raises(ZeroDivisionError):
            checked(lambda x: x * (1 // 0), random_input(3))


def test_a_module_need_not_have_a_length() -> None:
    """As what `torch.compile` makes of one: it passes `len` on to a module that has none."""

    class Wrapper(nn.Linear):
        def __len__(self) -> int:
            raise TypeError("Linear does not support len()")

    assert [tensor.name for tensor in checked(Wrapper(3, 2), torch.randn(4, 3)).tensors] == ["weight", "bias"]


def test_where_nothing_is_connected_no_probe_is_made() -> None:
    result = checked(lambda x: x.detach() * 2, random_input(3))
    assert (only(result).verdict, only(result).cut_by, result.probes) == ("not_connected", "detach", [])
    assert result.passed


def test_a_forward_that_is_not_finite_says_which_operation_was_first() -> None:
    result = checked(lambda x: (x - 5).log().exp(), random_input(3))
    assert not result.passed
    (probe,) = result.probes
    assert (probe.name, probe.holds) == ("finite_forward", False)
    assert "nan: first made by" in probe.detail
    assert "log" in probe.detail


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: (x * 1e308 * 1e10).sum(), "first made by Tensor.sum, after an infinity first made by Tensor.mul"),
        (lambda x: (x * 1e3).exp(), "the output is infinite: first made by Tensor.exp"),
        (lambda x: x.masked_fill(x > -9, -torch.inf).softmax(-1), "nan: first made by Tensor.softmax"),
    ],
    ids=["infinities of both signs", "an overflow", "a row that is all masked"],
)
def test_what_came_first(function: Callable[[Tensor], Tensor], said: str) -> None:
    x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
    (probe,) = checked(function, x).probes
    assert probe.detail.endswith(said)


def test_an_input_that_is_not_finite() -> None:
    (probe,) = checked(lambda x, y: x * y, random_input(3), torch.tensor([1.0, torch.nan, 2.0])).probes
    assert probe.detail == "the output is nan: y itself is nan"
