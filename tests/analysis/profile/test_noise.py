from __future__ import annotations

import pytest

from bptool.analysis.profile.noise import noise_warnings
from bptool.instruments.cpu_use import CpuUse

QUIET = CpuUse(others_cores=0.05, throttled=0.0)
STEADY = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.0]


def warnings_of(
    step_s: list[float], use: CpuUse = QUIET, cores: int = 2, threads: int = 2, asked: int | None = None
) -> list[str]:
    return noise_warnings(step_s, use, cores=cores, threads=threads, asked=asked or len(step_s))


def test_a_quiet_machine() -> None:
    assert warnings_of(STEADY) == []
    assert warnings_of(STEADY, CpuUse(None, None)) == []


def test_too_few_steps() -> None:
    (said,) = warnings_of([1.0] * 5)
    assert said.startswith("5 steps were timed: fewer than 6")
    assert said.endswith("--steps 10")
    assert warnings_of([1.0])[0].startswith("1 step was timed")
    assert warnings_of([1.0] * 6) == []


def test_interrupted() -> None:
    (said,) = warnings_of([1.0] * 2, asked=10)
    assert "--steps" not in said


def test_without_a_step_there_is_nothing_to_doubt() -> None:
    assert warnings_of([], CpuUse(1.9, 0.3), asked=10) == []


def test_a_wide_spread() -> None:
    """The tenth percentile of 0.1, 0.2, ... 1.1 is 0.2, the ninetieth 1.0; mixed, so that nothing slows down."""
    (said,) = warnings_of([0.1, 1.1, 0.3, 0.9, 0.7, 0.5, 0.6, 1.0, 0.2, 0.8, 0.4])
    assert "between 0.2 and 1 s" in said
    assert "--steps 33" in said


@pytest.mark.parametrize(
    ("others", "cores", "threads", "said"),
    [(0.8, 2, 2, True), (0.8, 2, 1, False), (1.2, 2, 1, True), (7.0, 16, 8, False), (9.0, 16, 8, True)],
)
def test_others_disturb_where_no_core_is_left(others: float, cores: int, threads: int, said: bool) -> None:
    found = warnings_of(STEADY, CpuUse(others, 0.0), cores, threads)
    assert [f"kept {others:.1f} of {cores} cores busy" in one for one in found] == [True] * said


def test_a_limit_of_the_control_group() -> None:
    (said,) = warnings_of(STEADY, CpuUse(0.0, 0.3))
    assert "held this process back for 30% of the time" in said
    assert "OMP_NUM_THREADS" in said


def test_a_machine_that_slows_down() -> None:
    (said,) = warnings_of([1.0] * 4 + [1.2] * 4)
    assert "took 20% longer than the earlier ones" in said
    assert warnings_of([1.2] * 4 + [1.0] * 4) == []  # warming up is another matter
