"""The order of a grid's jobs, with processes that are only pretended; and a real grid, killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measured_grids import SMALL, header_of, left_of, questions_of, workloads

from bptool.analysis.compare import session
from bptool.analysis.compare.entries import Entry, GradientComparison, Header, Prediction, RowRun
from bptool.analysis.compare.job import Job, Outcome
from bptool.analysis.compare.journal import Journal, read
from bptool.analysis.compare.measuring import measure_grid
from bptool.analysis.compare.row_worker import FOLDER_PREFIX

PHASES = {"step_s": 1.0, "forward_s": 0.2, "recompute_s": 0.1, "backward_s": 0.5, "units": 8}
GOOD: dict[str, dict[str, Any]] = {
    "equality": {"changed": []},
    "reference": {"reference": "float64"},
    "gradient": {"relative_error": 1e-3, "layers": {"a": 1e-3}},
    "run": {"peak_bytes": 5, "steps": [PHASES], "losses": [2.0, 1.0]},
}


class Pretended:
    """Answers every job, and notes it; `answer` says otherwise for some. Stops after `last` jobs."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.answer: Callable[[Job], Outcome | None] = lambda job: None
        self.last = 10**6

    def __call__(self, job: Job, *, time_limit_s: float, stopped: Callable[[], bool]) -> Outcome | None:
        if len(self.jobs) == self.last:
            os.kill(os.getpid(), signal.SIGINT)
            while not stopped():
                time.sleep(0.01)
            return None
        self.jobs.append(job)
        return self.answer(job) or Outcome(figures=GOOD[job.kind])

    def short(self) -> list[str]:
        """Each job's kind and row, by what the row's own settings say."""
        own = [[one.partition("=")[2] for one in job.settings[len(SMALL) :]] for job in self.jobs]
        return [f"{job.kind} {' '.join(values)}" for job, values in zip(self.jobs, own, strict=True)]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    jobs = Pretended()
    monkeypatch.setattr(session, "run_job", jobs)
    return jobs


def runs(short: list[str]) -> list[str]:
    return [job for job in short if job.startswith("run")]


def policies(*names: str) -> list[dict[str, str]]:
    return [{"activation_checkpoint.policy": name} for name in names]


def measured(path: Path, header: Header, *entries: Entry) -> tuple[bool, list[str], list[Entry]]:
    """Whether it was stopped, what was told, and what the file holds."""
    told: list[str] = []
    with Journal.resume(path, header) if path.exists() else Journal.create(path, header) as journal:
        for entry in entries:
            journal.append(entry)
        stopped = measure_grid(questions_of(header), header, journal, told.append)
    return stopped, told, read(path)[1]


def test_gradients_first_then_rounds_that_begin_one_further(pretended: Pretended, tmp_path: Path) -> None:
    header = header_of(policies("none", "full", "mlp"), rounds=3)
    stopped, told, entries = measured(tmp_path / "grid", header)
    gradients = ["reference none", "gradient none", "equality full", "gradient full", "equality mlp", "gradient mlp"]
    rounds = ["none", "full", "mlp", "full", "mlp", "none", "mlp", "none", "full"]
    assert pretended.short() == gradients + [f"run {name}" for name in rounds]
    assert not stopped
    assert [(e.kind, e.row) for e in entries[:3]] == [("gradient", row) for row in range(3)]
    assert [(e.round, e.row) for e in entries if isinstance(e, RowRun)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
        (1, 0),
        (2, 2),
        (2, 0),
        (2, 1),
    ]
    assert told[0] == "gradient of none: 1.0e-03 from float64"
    assert told[-1] == "round 3 of 3: full, 1.00 s a step"


def test_rows_are_called_as_in_the_report(pretended: Pretended, tmp_path: Path) -> None:
    """`false` alone would not say of what."""
    pretended.answer = lambda job: Outcome(status="timed_out", reason="so") if job.kind == "run" else None
    rows = [{"training.compile": "false"}, {"training.compile": "true"}]
    _, told, _ = measured(tmp_path / "grid", header_of(rows, rounds=1))
    assert told[-2:] == [f"round 1 of 1: compile={word}, timed out: so" for word in ("false", "true")]


def test_what_rows_have_in_common_is_found_out_once(pretended: Pretended, tmp_path: Path) -> None:
    rows = [
        {"activation_checkpoint.policy": policy, "optimizer.name": optimizer, "precision.mode": mode}
        for policy in ("none", "full")
        for optimizer in ("adamw", "sgd")
        for mode in ("fp32", "bf16")
    ]
    _, _, entries = measured(tmp_path / "grid", header_of(rows, rounds=1))
    kinds = [job.kind for job in pretended.jobs]
    assert [kinds.count(kind) for kind in ("equality", "reference", "gradient", "run")] == [1, 1, 4, 8]
    assert sorted(e.row for e in entries if isinstance(e, GradientComparison)) == list(range(8))


def test_other_models_have_other_references(pretended: Pretended, tmp_path: Path) -> None:
    rows = [{"model.d_ff": width, "model.attention": how} for width in (32, 48) for how in ("sdpa", "eager")]
    measured(tmp_path / "grid", header_of(rows, rounds=1))
    references = [job.reference for job in pretended.jobs if job.kind == "reference"]
    assert len(set(references)) == len(references) == 2
    compared = [job.reference for job in pretended.jobs if job.kind == "gradient"]
    assert compared == [references[0]] * 2 + [references[1]] * 2


def test_all_gradients_are_of_the_reference_rows_batch(pretended: Pretended, tmp_path: Path) -> None:
    rows = [{"training.micro_batch_size": size} for size in (1, 4, 2)]
    measured(tmp_path / "grid", header_of(rows, rounds=1, reference=1))
    assert {job.sequences for job in pretended.jobs} == {4}


@pytest.mark.parametrize(("compiled", "warmup", "expected"), [(False, 1, 2), (True, 1, 3), (True, 5, 5)])
def test_all_rows_warm_up_as_long_as_a_compiled_one_needs(
    compiled: bool, warmup: int, expected: int, pretended: Pretended, tmp_path: Path
) -> None:
    rows = [{"training.compile": "false"}, {"training.compile": str(compiled).lower()}]
    measured(tmp_path / "grid", header_of(rows, rounds=1, warmup=warmup))
    assert {job.warmup for job in pretended.jobs} == {expected}


def test_rows_that_something_is_wrong_with_are_not_run(pretended: Pretended, tmp_path: Path) -> None:
    def answer(job: Job) -> Outcome | None:
        words = " ".join(job.settings)
        if job.kind == "equality" and "policy=mlp" in words:
            return Outcome(figures={"changed": ["a.weight", "b", "c", "d"]})
        if job.kind == "gradient" and "policy=attention" in words:
            return Outcome(status="unsupported", reason="no kernel")
        if job.kind == "run" and "policy=full" in words:
            return Outcome(status="timed_out", reason="not done after 3 s")
        return None

    pretended.answer = answer
    header = header_of(policies("none", "full", "mlp", "attention", "offload"))
    refused = Prediction(row=4, status="out_of_memory", reason="needs 3 GiB")
    _, told, entries = measured(tmp_path / "grid", header, refused)
    status = {row: next((e.status for e in entries if e.row == row and e.status != "ok"), "ok") for row in range(5)}
    assert status == {0: "ok", 1: "timed_out", 2: "gradients_differ", 3: "unsupported", 4: "out_of_memory"}
    assert runs(pretended.short()) == ["run none", "run full", "run none"]
    assert "offload" not in " ".join(pretended.short())
    assert "gradient of mlp: gradients differ: recomputation changes a.weight, b, c and 1 more" in " ".join(told)
    assert "round 1 of 2: full, timed out: not done after 3 s" in told


def test_a_check_that_fails_is_no_fault_of_the_row(pretended: Pretended, tmp_path: Path) -> None:
    def answer(job: Job) -> Outcome | None:
        if job.kind == "equality":
            return Outcome(status="timed_out", reason="not done after 3 s")
        if job.kind == "reference":
            return Outcome(figures={"reference": None}, notes=["no gradient in float64: memory ran out"])
        return None

    pretended.answer = answer
    _, told, entries = measured(tmp_path / "grid", header_of(policies("none", "full"), rounds=1))
    plain, full = (entry for entry in entries if isinstance(entry, GradientComparison))
    assert (plain.status, plain.relative_error, full.status) == ("ok", None, "ok")
    assert plain.reason == "no reference gradient: no gradient in float64: memory ran out"
    assert full.reason.startswith("not compared with policy none to the bit: not done after 3 s; no reference")
    assert runs(pretended.short()) == ["run none", "run full"]
    assert told.count("no gradient in float64: memory ran out") == 1


@pytest.mark.parametrize("last", range(9))
def test_stopped_anywhere_it_resumes_with_what_is_missing(last: int, pretended: Pretended, tmp_path: Path) -> None:
    header = header_of(policies("none", "full"))
    whole = measured(tmp_path / "whole", header)[2]
    jobs = pretended.short()
    pretended.jobs.clear()
    pretended.last = last
    path = tmp_path / "grid"
    stopped, _, begun = measured(path, header)
    assert stopped == (last < len(jobs))
    assert begun == whole[: len(begun)]
    first = pretended.short()
    pretended.jobs.clear()
    pretended.last = 10**6
    stopped, _, finished = measured(path, header)
    assert not stopped
    assert finished == whole
    again = {job for job in first if job in pretended.short() and not job.startswith("run")}
    assert again <= {"reference none", "equality full"}  # what the session's own folder held
    assert runs(first + pretended.short()) == runs(jobs)


def test_rows_whose_settings_contradict_are_left_out(pretended: Pretended, tmp_path: Path) -> None:
    header = header_of(policies("none", "full"), rounds=1)
    with Journal.create(tmp_path / "grid", header) as journal:
        assert not measure_grid([None, *questions_of(header)[1:]], header, journal, lambda line: None)
    assert {entry.row for entry in read(tmp_path / "grid")[1]} == {1}


PROGRAM = """
import os, sys
from pathlib import Path
from measured_grids import questions_of
from bptool.analysis.compare.entries import Header
from bptool.analysis.compare.journal import Journal
from bptool.analysis.compare.measuring import measure_grid
header, path = Header.model_validate_json(sys.argv[1]), Path(sys.argv[2])
with Journal.resume(path, header) if path.exists() else Journal.create(path, header) as journal:
    sys.exit(130 if measure_grid(questions_of(header), header, journal, print) else 0)
"""


def started(header: Header, path: Path) -> subprocess.Popen[bytes]:
    """With temporary files in `temporary`, beside `path`."""
    temporary = path.with_name("temporary")
    temporary.mkdir(exist_ok=True)
    own = {"PIDS": str(path.with_name("pids")), "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, header.model_dump_json(), str(path)],
        env={**os.environ, **own, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.DEVNULL,
    )


def wait_for(ripe: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ripe():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_resumed_it_finds_the_same(tmp_path: Path) -> None:
    """But for times, which are never the same."""
    header = header_of([{"precision.mode": "fp32"}, {"activation_checkpoint.policy": "full"}], rounds=1)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert started(header, whole).wait(timeout=200) == 0
    for count in (2, 4):
        process = started(header, cut)
        wait_for(lambda: cut.exists() and cut.read_bytes().count(b"\n") >= count)  # noqa: B023
        process.kill()
        process.wait()
    assert started(header, cut).wait(timeout=200) == 0
    assert [timeless(entry) for entry in read(cut)[1]] == [timeless(entry) for entry in read(whole)[1]]


def timeless(entry: Entry) -> Entry:
    return entry.model_copy(update={"steps": len(entry.steps)}) if isinstance(entry, RowRun) else entry


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_stop_leaves_nothing_behind_but_what_was_found(number: int, code: int, tmp_path: Path) -> None:
    target = f"{workloads(tmp_path)}:hangs"
    header = header_of([{"precision.mode": "fp32"}], target, overrides=[], rounds=1)
    path, pids = tmp_path / "grid.jsonl", tmp_path / "pids"
    process = started(header, path)
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 3)
    assert list((tmp_path / "temporary").glob(f"{FOLDER_PREFIX}*"))
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    assert left_of(pids) == []
    assert not list((tmp_path / "temporary").glob(f"{FOLDER_PREFIX}*"))
    assert read(path) == (header, [])


@pytest.mark.slow
def test_blocks_that_cannot_be_repeated_are_refused(tmp_path: Path) -> None:
    target = f"{workloads(tmp_path)}:counting"
    header = header_of(policies("none", "full"), target, overrides=["training.device=cpu"], rounds=1)
    entries = measured(tmp_path / "grid", header)[2]
    plain, full, run = entries
    assert isinstance(plain, GradientComparison)
    assert isinstance(full, GradientComparison)
    assert (plain.status, plain.reference) == ("ok", "float64")
    assert (full.status, run.row, run.status) == ("gradients_differ", 0, "ok")
    assert "0.linear.weight" in full.changed
