from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import pytest

from bptool.errors import StorageError
from bptool.report.train.metrics_file import MetricsFile


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_there_as_soon_as_its_step_is_done(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file.step_done(1, {"train/loss": 2.5, "perf/mfu": 0.25})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "train/loss": 2.5, "perf/mfu": 0.25}\n'
    file.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file.step_done(1, {"train/loss": value})
    file.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "train/loss": None}


@pytest.mark.parametrize(
    "tail",
    ["", '{"step": 4, "train/lo', '{"step": 4}\n{"st', '{"step": 3}\n{"step": 4}\n', "\x00\x00\x00\n", "[1]\n", "7\n"],
)
def test_a_resume_at_step_2_keeps_each_step_once(tmp_path: Path, tail: str) -> None:
    """Whatever a killed process left behind the lines of steps 1 and 2: later steps, a line cut short, no JSON."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    file = MetricsFile(path, 2)
    file.step_done(3, {})
    file.step_done(4, {})
    file.close()
    assert steps(path) == [1, 2, 3, 4]


def test_a_resume_from_the_start_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path, 0).close()
    assert path.read_text() == ""


def test_a_line_in_another_encoding_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n')
    MetricsFile(path, 5).close()
    assert steps(path) == [1]


def test_what_the_disk_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"m.jsonl could not be written: No such file"):
        MetricsFile(tmp_path / "nowhere" / "m.jsonl", 0)


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: what is beyond is refused in the middle of a line."""
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file.step_done(1, {"train/loss": 2.5})
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
    try:
        with pytest.raises(StorageError, match=r"m\.jsonl could not be written: File too large"):
            file.step_done(2, {"train/loss": 2.25})
        with pytest.raises(StorageError, match=r"m\.jsonl could not be written: File too large"):
            file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = MetricsFile(tmp_path / "m.jsonl", 1)
    again.step_done(2, {"train/loss": 2.25})
    again.close()
    assert steps(tmp_path / "m.jsonl") == [1, 2]
