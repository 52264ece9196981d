"""A profile in TensorBoard, read back by TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from profile_records import deep_profile, small_profile
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bptool.errors import StorageError
from bptool.report.profile.tensorboard import write_scalars


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_each_timed_step_is_a_point(tmp_path: Path) -> None:
    profile = small_profile()
    assert profile.time is not None
    write_scalars(tmp_path / "new" / "folder", profile)
    board = read(tmp_path / "new" / "folder")
    phases = ("step", "data", "forward", "recompute", "backward", "clip", "optimizer")
    assert set(board.Tags()["scalars"]) == {
        *(f"perf/{phase}_s" for phase in phases),
        *("perf/tokens_per_s", "perf/mfu", "perf/hfu", "perf/backward_over_forward"),
    }
    for phase in phases:
        points = [(event.step, event.value) for event in board.Scalars(f"perf/{phase}_s")]
        samples = getattr(profile.time, phase).samples_s
        assert points == [(i, pytest.approx(seconds)) for i, seconds in enumerate(samples, 1)]


def test_figures_of_a_step_are_from_its_own_time(tmp_path: Path) -> None:
    profile = small_profile()
    assert profile.time is not None
    write_scalars(tmp_path, profile)
    board = read(tmp_path)
    rates = [event.value for event in board.Scalars("perf/tokens_per_s")]
    assert rates == [pytest.approx(512 / seconds, rel=1e-5) for seconds in profile.time.step.samples_s]
    assert board.Scalars("perf/mfu")[1].value == pytest.approx(profile.mfu)
    ratios = [event.value for event in board.Scalars("perf/backward_over_forward")]
    assert ratios == [pytest.approx(profile.time.backward_over_forward, rel=1e-5)] * 3


def test_what_is_not_known_is_not_written(tmp_path: Path) -> None:
    write_scalars(tmp_path, small_profile({"mfu": None, "hfu": None}, recomputes=False))
    tags = read(tmp_path).Tags()["scalars"]
    assert not {"perf/mfu", "perf/hfu", "perf/recompute_s"} & set(tags)
    write_scalars(tmp_path / "counted", deep_profile())
    assert not (tmp_path / "counted").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        write_scalars(tmp_path / "file" / "folder", small_profile())
