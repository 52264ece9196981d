"""Real processes: whatever becomes of one is an outcome, and none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from measured_grids import SMALL, job_of, left_of, workloads

from bptool.analysis.compare import row_process
from bptool.analysis.compare.job import Outcome
from bptool.analysis.compare.row_process import run_job

slow = pytest.mark.slow


def outcome_of(name: str, folder: Path, *settings: str, time_limit_s: float = 60.0) -> Outcome:
    job = job_of("run", f"{workloads(folder)}:{name}", folder, settings)
    outcome = run_job(job, time_limit_s=time_limit_s, stopped=lambda: False)
    assert outcome is not None
    return outcome


def test_what_the_users_code_prints_is_not_ours(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor does it wait for our input, which is closed to it."""
    reader, writer = os.pipe()
    ours = os.dup(0)
    os.dup2(reader, 0)
    try:
        outcome = outcome_of("noisy", tmp_path)
    finally:
        os.dup2(ours, 0)
        for descriptor in (ours, reader, writer):
            os.close(descriptor)
    assert (outcome.status, outcome.reason) == ("ok", "")
    assert len(outcome.figures["losses"]) == 3
    assert capfd.readouterr() == ("", "")


@slow
def test_an_error_is_told_with_the_users_own_line(tmp_path: Path) -> None:
    outcome = outcome_of("raises", tmp_path)
    assert outcome.status == "failed"
    line = next(i for i, text in enumerate((tmp_path / "strange.py").read_text().splitlines(), 1) if "no such" in text)
    assert "ValueError: no such layer" in outcome.reason
    assert f"strange.py, line {line}, in loss" in outcome.reason


@slow
def test_memory_that_is_not_there(tmp_path: Path) -> None:
    outcome = outcome_of("greedy", tmp_path)
    assert outcome.status == "out_of_memory"


@slow
def test_a_death_by_a_signal_is_told_with_its_name(tmp_path: Path) -> None:
    outcome = outcome_of("crashes", tmp_path)
    assert outcome.status == "failed"
    assert "SIGSEGV" in outcome.reason
    assert "the last words" in outcome.reason


@slow
def test_a_process_that_leaves_without_an_answer(tmp_path: Path) -> None:
    outcome = outcome_of("leaves", tmp_path)
    assert outcome.status == "failed"
    assert "exit code 7" in outcome.reason


@slow
@pytest.mark.parametrize(("counts", "status"), [((3, 3), "failed"), ((3, 4), "out_of_memory"), (None, "out_of_memory")])
def test_a_kill_is_the_kernels_where_it_counts_one(
    counts: tuple[int, int] | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "vmstat"
    monkeypatch.setattr(row_process, "_OOM_COUNTERS", (counter,))
    job = job_of("run", f"{workloads(tmp_path)}:killed", tmp_path)

    def stopped() -> bool:  # asked once it has begun
        if counts:
            counter.write_text(f"nr_free_pages 5\noom_kill {counts[1]}\n")
        return False

    if counts:
        counter.write_text(f"nr_free_pages 5\noom_kill {counts[0]}\n")
    outcome = run_job(job, time_limit_s=60, stopped=stopped)
    assert outcome is not None
    assert outcome.status == status
    assert "SIGKILL" in outcome.reason


@slow
def test_a_hang_ends_at_its_time_limit_with_all_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setenv("PIDS", str(pids))
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + (1000 if pids.exists() else 0))
    outcome = outcome_of("hangs", tmp_path, time_limit_s=900)
    assert outcome.status == "timed_out"
    assert "900 s" in outcome.reason
    assert "about to hang" in outcome.reason
    assert len(pids.read_text().split()) == 3
    assert left_of(pids) == []


@slow
def test_a_stop_ends_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setenv("PIDS", str(pids))
    job = job_of("run", f"{workloads(tmp_path)}:hangs", tmp_path)
    assert run_job(job, time_limit_s=60, stopped=pids.exists) is None
    assert left_of(pids) == []


@slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_none_is_left_where_the_command_is_killed(number: int, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    job = job_of("run", f"{workloads(tmp_path)}:hangs", tmp_path)
    program = (
        "import sys; from bptool.analysis.compare.job import Job; from bptool.analysis.compare.row_process import"
        " run_job; run_job(Job.model_validate_json(sys.argv[1]), time_limit_s=600, stopped=lambda: False)"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", program, job.model_dump_json()],
        env={**os.environ, "PIDS": str(pids), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 3)
        assert len(left_of(pids, seconds=0)) == 3
    finally:
        command.send_signal(number)
        command.wait()
    assert left_of(pids) == []


@slow
def test_none_is_left_where_the_keeper_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker goes with it, and the rest when the command notices."""
    pids = tmp_path / "pids"
    monkeypatch.setenv("PIDS", str(pids))
    job = job_of("run", f"{workloads(tmp_path)}:hangs", tmp_path)

    def stopped() -> bool:
        if pids.exists() and len(found := pids.read_text().split()) == 3:
            os.kill(int(found[1]), signal.SIGKILL)
        return False

    outcome = run_job(job, time_limit_s=60, stopped=stopped)
    assert outcome is not None
    assert outcome.status == "failed"
    assert left_of(pids) == []


@slow
def test_a_module_of_the_current_folder_hides_none_of_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    outcome = run_job(job_of("run", "tiny", tmp_path, SMALL), time_limit_s=60, stopped=lambda: False)
    assert outcome is not None
    assert outcome.status == "ok", outcome.reason


def wait_for(ripe: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ripe():
        assert time.monotonic() < deadline
        time.sleep(0.02)
