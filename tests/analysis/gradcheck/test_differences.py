"""Slopes of functions whose derivative is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.analysis.gradcheck.differences import Noise, slope

EPSILON = 2.0**-52
Function = Callable[[float], float]


class Counted:
    """A function that counts its evaluations."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, t: float) -> float:
        self.calls += 1
        return self.function(t)


def noise_of(value: float) -> Noise:
    return Noise(EPSILON * max(1.0, abs(value)))


SMOOTH: dict[str, tuple[Function, float]] = {
    "exp": (math.exp, 1.0),
    "a fast wave": (lambda t: math.sin(50 * t + 0.3), 50 * math.cos(0.3)),
    "a line": (lambda t: 3 * t, 3.0),
    "a large constant": (lambda t: 1e6 + t, 1.0),
    "a constant": (lambda t: 1.0, 0.0),
    "no third derivative": (lambda t: t**5 + 2 * t, 2.0),
    "near the edge of its domain": (lambda t: math.log(0.001 + t) if t > -0.001 else math.nan, 1000.0),
    "a kink near by": (lambda t: abs(t - 1e-6) + 2 * t, 1.0),
    "a small kink near by": (lambda t: 1e-3 * abs(t - 3e-4) + 2 * t, 2 - 1e-3),
    "a jump near by": (lambda t: t + (t > 1e-5), 1.0),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_the_slope_is_within_its_error_bar(name: str) -> None:
    function, right = SMOOTH[name]
    counted = Counted(function)
    found = slope(counted, function(0.0), noise_of(function(0.0)), goal=1e-9)
    assert abs(found.value - right) <= found.error_bar
    assert found.error_bar < 1e-6 * max(1.0, abs(right))
    assert found.jump == 0
    assert counted.calls <= 16


@given(st.floats(-3, 3), st.floats(0.1, 30), st.floats(-3, 3))
def test_the_error_bar_holds_for_waves(shift: float, frequency: float, size: float) -> None:
    def wave(t: float) -> float:
        return size * math.sin(frequency * t + shift)

    found = slope(wave, wave(0.0), noise_of(size), goal=1e-9)
    right = size * frequency * math.cos(shift)
    assert abs(found.value - right) <= found.error_bar < 1e-6 * max(1.0, abs(size) * frequency)


@pytest.mark.parametrize(
    ("function", "jump"),
    [(abs, 2.0), (lambda t: max(t, 0.0) + t * t, 1.0), (lambda t: 5 * t - 1e-3 * abs(t), -2e-3)],
)
def test_a_kink_is_seen_and_half_of_it_is_in_the_error_bar(function: Function, jump: float) -> None:
    found = slope(function, function(0.0), noise_of(0.0), goal=1e-9)
    assert found.jump == pytest.approx(jump, rel=1e-3)
    assert found.error_bar >= abs(jump) / 2


def test_a_jump_at_the_point_itself_is_a_kink_of_any_size() -> None:
    found = slope(lambda t: t + (t > 0), 0.0, noise_of(1.0), goal=1e-9)
    assert abs(found.jump) > 100


def test_where_the_function_is_not_finite_there_is_no_slope() -> None:
    found = slope(lambda t: math.sqrt(t) if t >= 0 else math.nan, 0.0, noise_of(0.0), goal=1e-9)
    assert math.isnan(found.value)
    assert found.error_bar == math.inf


def test_noise_widens_the_error_bar() -> None:
    rough = Noise(1e-6)
    found = slope(lambda t: math.exp(t) + 1e-6 * math.sin(1e9 * t), 1.0, rough, goal=1e-9)
    assert abs(found.value - 1) <= found.error_bar
    assert found.error_bar > 1e-6
