from __future__ import annotations

import pytest
import torch

from bptool.analysis.profile.prediction import PHASES
from bptool.analysis.profile.recorder_cost import recorder_costs
from bptool.instruments.phase_timer import PhaseTimer


def test_every_phase_has_one_and_it_is_of_one_operation() -> None:
    """More than nothing, and far from a millisecond."""
    costs = recorder_costs()
    assert costs.keys() == set(PHASES)
    assert all(0 <= cost.together_s < 1e-3 for cost in costs.values())
    assert all(0 <= cost.inside_s < 1e-3 for cost in costs.values())
    assert costs["forward"].together_s > 0


def test_random_numbers_are_not_drawn_from_the_runs() -> None:
    """The next step's dropout must not depend on whether one was recorded."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    recorder_costs()
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_recorded_less_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second at each look: the timer looks twice a phase, the recorder at each operation."""
    now = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    monkeypatch.setattr(PhaseTimer.__init__, "__defaults__", (lambda: next(now),))
    costs = recorder_costs()
    # Begin, end and done of an operation are three seconds, of which the last is the recorder's own; a phase's begin
    # and end are one by the timer.
    n = 100
    assert costs["optimizer"].together_s == pytest.approx((2 * n - 1) / n)
    assert [cost.inside_s for cost in costs.values()] == pytest.approx([(n - 1) / n] * len(costs))
