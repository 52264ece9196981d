from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.config.schema import ScheduleSettings
from bptool.training.schedule import learning_rate


def rates(total: int, **settings: Any) -> list[float]:
    """Of a run of `total` steps with peak 2."""
    schedule = ScheduleSettings(**settings)
    return [learning_rate(step, peak=2.0, total_steps=total, schedule=schedule) for step in range(total)]


def test_constant() -> None:
    assert rates(6, name="constant", warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(3, name="constant", warmup_steps=0) == [2.0, 2.0, 2.0]


def test_linear() -> None:
    """From the peak on the warm-up's last step down to a quarter of it on the run's last: 4 equal falls."""
    assert rates(6, name="linear", warmup_steps=2, final_lr_fraction=0.25) == pytest.approx(
        [1.0, 2.0, 1.625, 1.25, 0.875, 0.5]
    )


def test_cosine() -> None:
    """1 + cos of 0, 60, 120 and 180 degrees is 2, 1.5, 0.5 and 0."""
    assert rates(5, name="cosine", warmup_steps=2, final_lr_fraction=0.0) == pytest.approx([1.0, 2.0, 1.5, 0.5, 0.0])
    assert rates(5, name="cosine", warmup_steps=2, final_lr_fraction=0.5) == pytest.approx([1.0, 2.0, 1.75, 1.25, 1.0])


def test_warmup_stable_decay() -> None:
    """Two steps up, a plateau, and 40% of 10 steps down to nothing."""
    assert rates(10, name="wsd", warmup_steps=2, decay_fraction=0.4, final_lr_fraction=0.0) == pytest.approx(
        [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    )


def test_a_decay_that_meets_the_warmup_begins_after_it() -> None:
    """80% of 10 steps would begin within the warm-up's 4: the rate may not jump where that ends."""
    assert rates(10, name="wsd", warmup_steps=4, decay_fraction=0.8, final_lr_fraction=0.25) == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5]
    )


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_a_run_shorter_than_its_warmup_is_all_warmup(name: str) -> None:
    assert rates(3, name=name, warmup_steps=8) == [0.25, 0.5, 0.75]


shapes = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["constant", "linear", "cosine", "wsd"]),
        "warmup_steps": st.integers(0, 30),
        "final_lr_fraction": st.floats(0, 1),
        "decay_fraction": st.floats(0.01, 1),
    }
)


@given(st.integers(1, 60), shapes)
def test_it_rises_to_the_peak_and_falls_to_the_end_without_a_jump(total: int, settings: dict[str, Any]) -> None:
    curve = rates(total, **settings)
    warmup = settings["warmup_steps"]
    low = 2.0 * settings["final_lr_fraction"]
    assert all(0 <= rate <= 2.0 for rate in curve)
    assert curve[:warmup] == sorted(curve[:warmup])
    assert curve[warmup:] == sorted(curve[warmup:], reverse=True)
    if total < warmup:
        return
    if warmup:
        assert curve[warmup - 1] == 2.0
    if settings["name"] == "constant":
        assert curve[-1] == 2.0
    elif total > warmup:
        assert curve[-1] == pytest.approx(low, abs=1e-12)
    decay_steps = total - warmup
    if settings["name"] == "wsd":
        decay_steps = min(decay_steps, max(round(settings["decay_fraction"] * total), 1))
    steepest = math.pi / 2 * 2.0 / max(decay_steps, 1)  # of a cosine; a line falls less at once
    falls = [a - b for a, b in zip(curve[warmup - 1 if warmup else 0 :], curve[warmup or 1 :], strict=False)]
    assert all(fall <= steepest + 1e-12 for fall in falls)
