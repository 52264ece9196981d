"""The order of things: every row is predicted, and what may run is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from compare_records import MODE, POLICY

from bptool.analysis.compare import comparing
from bptool.analysis.compare.comparing import Mode, Plan, header_of, mode_of, run_grid, size
from bptool.analysis.compare.entries import Header, Prediction
from bptool.analysis.compare.grid import read_grid
from bptool.analysis.compare.journal import Journal
from bptool.analysis.compare.prediction import Predictor
from bptool.analysis.machine import Machine
from bptool.analysis.profile.counting import count_deep
from bptool.analysis.profile.depth import Counted
from bptool.analysis.question import Question, ask
from bptool.config.schema import Config
from bptool.errors import DeviceError
from bptool.training.workload import Workload

SMALL = ["model.n_layers=2", "model.d_model=32", "model.n_heads=2", "training.micro_batch_size=2"]
READS_VALUES = """
import torch
from bptool import Workload

def net():
    return Workload(
        model=lambda: torch.nn.Linear(4, 4),
        batch=lambda generator: torch.randn(2, 4, generator=generator),
        loss=lambda model, batch: model(batch).mean() * (2 if batch.sum().item() > 0 else 1),
    )
"""


def plan(mode: Mode = "measure") -> Plan:
    return Plan(mode, warmup=1, steps=4, rounds=2, time_limit_s=60.0)


class Measured:
    """In the place of `measure_grid`: what it was given."""

    def __init__(self) -> None:
        self.questions: list[Question | None] = []

    def __call__(
        self, questions: Sequence[Question | None], header: Header, journal: Journal, done: Callable[[str], None]
    ) -> bool:
        self.questions = list(questions)
        return False


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    found = Measured()
    monkeypatch.setattr(comparing, "measure_grid", found)
    return found


def run(words: list[str], folder: Path, mode: Mode = "measure", target: str = "tiny") -> tuple[Journal, list[str]]:
    grid = read_grid(target, words, device="cpu")
    header, told = header_of(grid, plan(mode)), list[str]()
    journal = Journal.create(folder / "grid.jsonl", header)
    assert not run_grid(grid, header, journal, told.append)
    return journal, told


def test_what_is_refused_is_not_run(measured: Measured, tmp_path: Path) -> None:
    journal, told = run([*SMALL, f"{POLICY}=none,budget:1KiB", f"{MODE}=fp32,tf32"], tmp_path)
    assert [entry.status for entry in journal.entries] == ["ok", "unsupported", "unsupported", "unsupported"]
    assert [question is not None for question in measured.questions] == [True, False, False, False]
    assert told[-1].startswith("1 row x 2 rounds, each a process of 5 steps: about ")


def test_a_budgets_plan_is_found_once_and_every_process_keeps_to_it(measured: Measured, tmp_path: Path) -> None:
    """Times differ from process to process; a grid that goes on takes the plan that its file has."""
    words = [*SMALL, f"{POLICY}=none,budget:1GiB"]
    journal, _ = run(words, tmp_path)
    journal.close()
    found = journal.entries[1]
    assert isinstance(found, Prediction)
    assert "by operations' times measured here" in found.notes[0]
    asked = measured.questions[1]
    assert asked is not None
    assert asked.settings[-1] == f"{POLICY}=plan:{found.plan}"
    again = ask(asked.target, asked.settings, command="compare", device="cpu")
    assert again.config.activation_checkpoint.plan == found.plan
    assert found.plan == "2*none"
    file = tmp_path / "grid.jsonl"
    before = file.read_text()
    file.write_text(before.replace('"2*none"', '"2*attention"'))
    assert file.read_text() != before
    grid = read_grid("tiny", words, device="cpu")
    header = header_of(grid, plan("measure"))
    with Journal.resume(file, header) as resumed:
        run_grid(grid, header, resumed, lambda words: None)
    continued = measured.questions[-1]
    assert continued is not None
    assert continued.config.activation_checkpoint.policy == "attention"


def test_a_model_that_cannot_be_predicted_is_run_all_the_same(measured: Measured, tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(READS_VALUES)
    journal, told = run([f"{MODE}=fp32,bf16"], tmp_path, target=f"{file}:net")
    for entry in journal.entries:
        assert isinstance(entry, Prediction)
        assert (entry.status, entry.peak_bytes) == ("ok", None)
        assert entry.notes[0].startswith("not predicted: ")
    assert all(measured.questions)
    assert told[-1] == "2 rows x 2 rounds, each a process of 5 steps"


def test_nothing_is_run_where_a_prediction_was_asked_for(measured: Measured, tmp_path: Path) -> None:
    journal, _ = run([*SMALL, f"{POLICY}=none,full"], tmp_path, mode="predict")
    assert len(journal.entries) == 2
    assert measured.questions == []


def test_rows_that_are_counted_alike_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Config] = []

    def counting(config: Config, workload: Workload, machine: Machine) -> Counted:
        calls.append(config)
        return count_deep(config, workload, machine)

    monkeypatch.setattr("bptool.analysis.compare.prediction.count_deep", counting)
    grid = read_grid("tiny", [*SMALL, f"{MODE}=fp32,tf32,bf16"], gpu="h100")
    predictor = Predictor()
    fp32, tf32, bf16 = (predictor.predict(i, row.question) for i, row in enumerate(grid.rows) if row.question)
    assert len(calls) == 2
    assert fp32.peak_bytes == tf32.peak_bytes != bf16.peak_bytes
    assert fp32.step_s is not None
    assert tf32.step_s is not None
    assert tf32.step_s <= fp32.step_s


def test_the_size_is_told_in_rows_axes_and_steps() -> None:
    grid = read_grid("tiny", [*SMALL, f"{POLICY}=none,full", f"{MODE}=fp32,tf32,bf16"], device="cpu")
    told = size(grid, plan())
    assert told.startswith(f"6 rows, 2 of them cannot be run: {POLICY} (2) x {MODE} (3); ")
    assert "2 rounds of 1 + 4 steps" in told


def test_rows_are_run_where_the_device_is_here() -> None:
    here, elsewhere = read_grid("tiny", [], device="cpu"), read_grid("tiny", [], gpu="h100")
    assert mode_of(here, None, named=False) == "measure"
    assert mode_of(here, "predict", named=False) == "predict"
    assert mode_of(elsewhere, None, named=True) == "predict"
    with pytest.raises(DeviceError, match="no GPU"):
        mode_of(elsewhere, "measure", named=True)
