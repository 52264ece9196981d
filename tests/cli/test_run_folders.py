"""A run's folder from the command line: who may write it, what is overwritten, what a resume may change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import Command, checkpoints, curve, invoke, weights

from bptool.training.run_folder import RunFolder


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def names() -> list[str]:
    return sorted(path.name for path in Path("runs").iterdir()) if Path("runs").exists() else []


class TestNewRun:
    def test_its_folder_is_what_the_readme_of_runs_says(self, train: Command) -> None:
        assert train("run.name=a").code == 0
        found = {path.name.split(".tfevents")[0] for path in Path("runs/a").iterdir()} - {".lock"}
        assert found == {
            *("config.json", "metrics.jsonl", "result.json", "tokenizer.json", "checkpoints", "events.out")
        }

    def test_without_a_name_it_is_named_after_the_target_and_numbered(self, train: Command) -> None:
        train()
        train()
        assert train("training.steps=1").code == 0
        assert names() == ["tiny", "tiny-2", "tiny-3"]

    def test_a_run_that_is_there_is_refused_with_both_ways_out(self, train: Command, done_run: Path) -> None:
        before = contents(done_run)
        done = train("run.name=done")
        assert done.code == 2
        assert "runs/done holds a run already" in done.err
        assert "bptool train --resume runs/done\n" in done.err
        assert "--force" in done.err
        assert contents(done_run) == before

    def test_force_overwrites_it(self, train: Command, done_run: Path) -> None:
        (done_run / "notes.txt").write_text("old")
        assert train("run.name=done", "training.steps=1", "--force").code == 0
        assert checkpoints(done_run) == [1]
        assert [step for step, _ in curve(done_run, "train/loss")] == [1]
        assert len(list(done_run.glob("events.*"))) == 1
        assert not (done_run / "notes.txt").exists()

    @pytest.mark.parametrize("mistake", ["data.source=missing.txt", "precision.mode=tf32", "model.d_model=65536"])
    def test_a_start_that_fails_leaves_the_overwritten_run_as_it_was(
        self, train: Command, done_run: Path, mistake: str
    ) -> None:
        before = contents(done_run)
        assert train("run.name=done", mistake, "--force").code in (2, 3)
        assert contents(done_run) == before
        assert names() == ["done"]

    @pytest.mark.parametrize("mistake", ["data.source=missing.txt", "training.device=cuda:7", "precision.mode=tf32"])
    def test_a_start_that_fails_leaves_no_folder(self, train: Command, mistake: str) -> None:
        assert train(mistake).code in (2, 3)
        assert names() == []

    @pytest.mark.parametrize("target", ["runs/done", "runs/done/config.json"])
    def test_a_run_as_target_gives_its_settings_and_not_its_name(self, done_run: Path, target: str) -> None:
        before = contents(done_run)
        assert invoke("train", target, "training.steps=2").code == 0
        assert names() == ["done", "done-2"]
        assert contents(done_run) == before
        assert curve(Path("runs/done-2"), "train/loss") == curve(done_run, "train/loss")[:2]


class TestOneWriter:
    @pytest.mark.parametrize("arguments", [["--resume", "done"], ["run.name=done", "--force"]])
    def test_a_second_one_is_refused(self, train: Command, done_run: Path, arguments: list[str]) -> None:
        before = contents(done_run)
        with RunFolder.resume(done_run):
            done = invoke("train", *arguments)
        assert done.code == 3
        assert "runs/done is being written by another process (pid " in done.err
        assert contents(done_run) == before


class TestResume:
    def test_of_no_run_names_the_runs_there_are(self, done_run: Path) -> None:
        done = invoke("train", "--resume", "doen")
        assert done.code == 2
        assert "no run at runs/doen" in done.err
        assert "did you mean 'done'?" in done.err
        assert "runs in runs: done\n" in done.err

    def test_where_there_are_none(self, here: Path) -> None:
        done = invoke("train", "--resume", "a")
        assert done.code == 2
        assert "bptool train" in done.err
        assert names() == []

    def test_of_a_finished_run_says_how_to_extend_it(self, done_run: Path) -> None:
        before = contents(done_run)
        done = invoke("train", "--resume", "done")
        assert done.code == 2
        assert "has done all its 6 steps" in done.err
        assert "bptool train --resume runs/done training.steps=12\n" in done.err
        assert contents(done_run) == before

    def test_of_a_run_that_was_killed_before_its_result_writes_it(self, done_run: Path) -> None:
        before = json.loads((done_run / "result.json").read_text())["result"]
        lines = (done_run / "metrics.jsonl").read_text()
        (done_run / "result.json").unlink()
        done = invoke("train", "--resume", "done", "--json")
        assert done.code == 0, done.err
        for key in ("run", "steps", "status", "val_loss", "sample", "predicted_peak_bytes"):
            assert done.result[key] == before[key]
        assert (done_run / "metrics.jsonl").read_text() == lines
        assert invoke("train", "--resume", "done").code == 2

    def test_more_steps_when_they_are_named(self, done_run: Path) -> None:
        done = invoke("train", "--resume", "done", "training.steps=8")
        assert done.code == 0
        assert "note: training.steps: 6 -> 8\n" in done.err
        assert "finished at step 8 of 8 (from step 6)" in done.out
        assert [step for step, _ in curve(done_run, "train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert json.loads((done_run / "config.json").read_text())["training"]["steps"] == 8

    def test_another_file_may_not_change_the_schedule_unnamed(self, done_run: Path) -> None:
        settings = json.loads((done_run / "config.json").read_text())
        settings["training"]["steps"] = 9
        settings["logging"]["every"] = 3
        Path("other.json").write_text(json.dumps(settings))
        before = contents(done_run)
        refused = invoke("train", "other.json", "--resume", "done")
        assert refused.code == 2
        assert "training.steps: 6 -> 9" in refused.err
        assert "name them on the command line: training.steps=9\n" in refused.err
        assert contents(done_run) == before
        allowed = invoke("train", "other.json", "--resume", "done", "training.steps=9")
        assert allowed.code == 0
        assert "note: logging.every: 1 -> 3\n" in allowed.err

    @pytest.mark.parametrize(
        ("change", "told"),
        [("model.d_model=64", "model.d_model: 32 -> 64"), ("optimizer.name=sgd", "optimizer.name: adamw -> sgd")],
    )
    def test_as_another_model_or_optimizer_is_refused(self, done_run: Path, change: str, told: str) -> None:
        before = contents(done_run)
        done = invoke("train", "--resume", "done", "training.steps=8", change)
        assert done.code == 2
        assert told in done.err
        assert contents(done_run) == before

    def test_other_data_must_be_named(self, done_run: Path, text: Path) -> None:
        shutil.copyfile(text, "text.txt")
        assert invoke("train", "runs/done", "data.source=text.txt", "run.name=b", "training.steps=2").code == 0
        Path("text.txt").write_text(Path("text.txt").read_text() + "# one line more\n")
        before = contents(Path("runs/b"))
        refused = invoke("train", "--resume", "b", "training.steps=4")
        assert refused.code == 2
        assert "the data is not what this run was trained on" in refused.err
        assert "data.source=text.txt" in refused.err
        assert contents(Path("runs/b")) == before
        assert invoke("train", "--resume", "b", "training.steps=4", "data.source=text.txt").code == 0

    def test_and_force_exclude_each_other(self, done_run: Path) -> None:
        done = invoke("train", "--resume", "done", "--force")
        assert done.code == 2
        assert "exclude each other" in done.err

    def test_continues_as_if_it_had_never_stopped(self, train: Command) -> None:
        """The oracle is the run that did not stop; dropout and accumulation are on, and the batch is split anew."""
        settings = ["model.dropout=0.1", "schedule.name=constant", "training.gradient_accumulation_steps=2"]
        train(*settings, "run.name=unbroken", "training.steps=7")
        train(*settings, "run.name=stopped", "training.steps=3")
        done = invoke("train", "--resume", "stopped", "training.steps=7")
        assert done.code == 0
        unbroken, stopped = Path("runs/unbroken"), Path("runs/stopped")
        assert weights(stopped) == weights(unbroken)
        for tag in ("train/loss", "train/lr", "train/grad_norm"):
            assert curve(stopped, tag) == curve(unbroken, tag)
