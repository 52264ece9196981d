from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bptool.analysis.sample import load_run_model, read_tokenizer, sample_run
from bptool.errors import CheckpointError, DataError, ResumeError
from bptool.training.run_folder import read_run_config


def no_notes(message: str) -> None:
    raise AssertionError(message)


def greedily(run: Path, prompt: str, count: int) -> str:
    """The likeliest byte, again and again, from a whole forward each time over the last 32."""
    model, _ = load_run_model(run, read_run_config(run), no_notes)
    ids = list(prompt.encode())
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.eval()(torch.tensor([ids[-32:]]))[0, -1].argmax()))
    return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("prompt", ["def f", "x" * 40])
def test_temperature_zero_is_the_likeliest_byte_each_time(done_run: Path, prompt: str) -> None:
    """The second prompt is longer than the model's context of 32."""
    settings = {"evaluation.temperature": 0.0, "evaluation.prompt": prompt, "evaluation.sample_tokens": 20}
    result = sample_run(done_run, settings, seed=0, note=no_notes)
    assert result.text == greedily(done_run, prompt, 20)
    assert (result.step, result.prompt, result.run) == (6, prompt, "runs/done")


def test_what_is_not_given_is_the_runs_own(done_run: Path) -> None:
    result = sample_run(done_run, {}, seed=1, note=no_notes)
    assert result.prompt == "def "
    assert result.text.startswith("def ")


def test_nothing_of_the_run_is_changed(done_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done_run.rglob("*")}
    sample_run(done_run, {"evaluation.sample_tokens": 3}, seed=1, note=no_notes)
    assert {path: path.stat().st_mtime_ns for path in done_run.rglob("*")} == before


def test_what_is_missing_is_told(done_run: Path) -> None:
    with pytest.raises(ResumeError, match="no run at runs/other"):
        sample_run(Path("runs/other"), {}, seed=0, note=no_notes)
    (done_run / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="without a tokenizer"):
        read_tokenizer(done_run)
    for folder in (done_run / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    notes: list[str] = []
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        load_run_model(done_run, read_run_config(done_run), notes.append)
    assert len(notes) == 3
