"""`bptool compare` as a user meets it."""

from __future__ import annotations

import json
import shlex
import signal
import time
from pathlib import Path

import pytest
from command_line import Done, ended, invoke, start
from compare_records import MODE, POLICY, header, prediction, run

from bptool.analysis.compare.entries import Entry, Header
from bptool.analysis.compare.journal import Journal, read
from bptool.config.loading import load_config
from bptool.config.target import resolve_target
from bptool.errors import EXIT_INTERRUPTED

SMALL = ("tiny", "model.n_layers=2", "model.d_model=32", "model.n_heads=2", "training.micro_batch_size=2")
POLICIES = f"{POLICY}=none,full"
GIB = 2**30


def compare(*arguments: str) -> Done:
    return invoke("compare", *arguments)


def written(folder: Path, grid: Header, *entries: Entry) -> str:
    """A grid's file that was made up."""
    file = folder / "grid.jsonl"
    with Journal.create(file, grid, force=True) as journal:
        for entry in entries:
            journal.append(entry)
    return str(file)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """A small grid, on a GPU that is not here, so that nothing is measured; and its file."""
    file = tmp_path_factory.mktemp("grid") / "grid.jsonl"
    axes = (POLICIES, f"{MODE}=fp32,bf16-mixed")
    return compare(*SMALL, *axes, "--gpu", "h100", "-o", str(file), "--json"), file


class TestContract:
    KEYS = frozenset(
        {
            *(
                "settings",
                "status",
                "predicted_peak_bytes",
                "measured_peak_bytes",
                "step_s",
                "tokens_per_s",
                "forward_s",
            ),
            *("recompute_s", "backward_s", "recompute_flops_share", "gradient_relative_error", "worst_layer"),
            *("final_loss", "on_front", "dominated_by"),
        }
    )

    def test_keys(self, predicted: tuple[Done, Path]) -> None:
        done, _ = predicted
        assert done.code == 0, done.err
        assert done.result.keys() >= {"reference", "rows", "best", "axes", "mode"}
        assert done.result["mode"] == "predict"
        assert done.result["reference"] == 0
        assert [row["settings"] for row in done.result["rows"]] == [
            {POLICY: policy, MODE: mode} for policy in ("none", "full") for mode in ("fp32", "bf16-mixed")
        ]
        for row in done.result["rows"]:
            assert row.keys() >= self.KEYS
            assert row["status"] == "ok"
            assert row["predicted_peak_bytes"] > 0
            assert row["on_front"] == (row["dominated_by"] == [])

    def test_measured_keys(self, tmp_path: Path) -> None:
        done = compare("--from", written(tmp_path, header(1), run(0)), "--json")
        assert done.result["rows"][0]["step_s"].keys() == {"median", "p10", "p90", "samples"}

    def test_its_size_is_told_before_it_runs(self, predicted: tuple[Done, Path]) -> None:
        done, file = predicted
        first, *rows = done.err.splitlines()
        assert first.startswith(f"4 rows: {POLICY} (2) x {MODE} (2); ")
        assert str(file) in first
        assert [line.partition(",")[0] for line in rows] == [f"row {i} of 4" for i in range(1, 5)]


class TestFile:
    def test_it_is_shown_again(self, predicted: tuple[Done, Path]) -> None:
        done, file = predicted
        again = compare("--from", str(file), "--json")
        assert again.code == 0
        assert again.err == ""
        assert again.result == done.result

    def test_it_is_never_overwritten_unasked(self, predicted: tuple[Done, Path]) -> None:
        _, file = predicted
        before = file.read_bytes()
        done = compare(*SMALL, POLICIES, "--gpu", "h100", "-o", str(file))
        assert (done.code, file.read_bytes()) == (2, before)
        assert "exists already" in done.err
        assert "--resume" in done.err

    def test_resuming_finds_out_what_is_missing_only(self, tmp_path: Path, predicted: tuple[Done, Path]) -> None:
        done, whole = predicted
        lines = whole.read_text().splitlines(keepends=True)
        file = tmp_path / "grid.jsonl"
        file.write_text("".join(lines[:4]))
        shown = compare("--from", str(file), "--json")
        assert shown.result["rows"][3]["status"] == "not_run"
        assert shown.result["interrupted"]
        axes = (POLICIES, f"{MODE}=fp32,bf16-mixed")
        resumed = compare(*SMALL, *axes, "--gpu", "h100", "-o", str(file), "--resume", "--json")
        assert [line.partition(",")[0] for line in resumed.err.splitlines()[1:]] == ["row 4 of 4"]
        assert resumed.result == done.result

    def test_its_name_is_the_targets_with_a_number_where_that_is_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("compare-tiny", "compare-tiny-2"):
            assert compare(*SMALL, POLICIES, "--gpu", "h100").code == 0
            assert read(Path("runs") / f"{name}.jsonl")[0].rows == [{POLICY: "none"}, {POLICY: "full"}]
        done = compare(*SMALL, POLICIES, "--gpu", "h100", "--resume")
        assert "runs/compare-tiny-2.jsonl" in done.err


class TestAnswer:
    FIT = ("--fit", "5GiB")
    ROWS = (
        prediction(0, peak=10 * GIB, step_s=1.0),
        prediction(1, peak=2 * GIB, step_s=2.0),
        prediction(2, peak=4 * GIB, step_s=1.5),
    )

    def test_the_fastest_that_fits_can_be_pasted(self, tmp_path: Path) -> None:
        file = written(tmp_path, header(3, mode="predict"), *self.ROWS)
        done = compare("--from", file, *self.FIT, "--json")
        assert done.code == 0
        assert done.result["best"]["row"] == 2
        command, train, target, *overrides = shlex.split(done.result["best"]["command"])
        assert (command, train) == ("bptool", "train")
        config = load_config(resolve_target(target), overrides)
        assert (config.activation_checkpoint.policy, config.training.steps) == ("save_matmuls", 9)
        assert compare("--from", file, *self.FIT).out.rstrip().endswith(done.result["best"]["command"])

    def test_none_fits(self, tmp_path: Path) -> None:
        done = compare("--from", written(tmp_path, header(3, mode="predict"), *self.ROWS), "--fit", "1GiB")
        assert done.code == 1
        assert "nothing fits 1.00 GiB. full needs the least, 2.00 GiB." in " ".join(done.out.split())

    def test_a_diverged_row(self, tmp_path: Path) -> None:
        done = compare("--from", written(tmp_path, header(2), run(0), run(1, losses=[3.0, 30.0])), "--json")
        assert done.code == 1
        assert done.result["rows"][1]["status"] == "diverged"

    def test_a_failed_row_is_no_failure(self, tmp_path: Path) -> None:
        entries = (run(0), run(1, status="failed", reason="signal 9"))
        done = compare("--from", written(tmp_path, header(2, rounds=1), *entries))
        assert done.code == 0
        assert "2  failed: signal 9" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([*SMALL, f"{POLICY}=none,ful"], 2, "did you mean 'full'?"),
        ([*SMALL, f"{POLICY}=none,budgt:4GiB"], 2, "did you mean 'budget'?"),
        ([*SMALL, f"{MODE}=fp32,fp32"], 2, "more than once"),
        (["tinny", POLICIES], 2, "did you mean 'tiny'?"),
        ([*SMALL, POLICIES, "--predict", "--measure"], 2, "exclude each other"),
        ([*SMALL, POLICIES, "--gpu", "h100", "--measure"], 2, "--measure runs on what is"),
        ([*SMALL, POLICIES, "--gpu", "h1000"], 2, "did you mean 'h100'?"),
        ([*SMALL, POLICIES, "--fit", "much"], 2, "--fit: 'much'"),
        ([*SMALL, POLICIES, "--fit", "0GiB"], 2, "--fit: nothing fits"),
        ([*SMALL, POLICIES, "--steps", "0"], 2, "--steps 0"),
        ([*SMALL, POLICIES, "--rounds", "0"], 2, "--rounds 0"),
        ([*SMALL, POLICIES, "--warmup", "-1"], 2, "--warmup -1"),
        ([*SMALL, POLICIES, "--time-limit", "0"], 2, "--time-limit 0"),
        ([*SMALL, POLICIES, "--resume", "--force"], 2, "exclude each other"),
        ([*SMALL, POLICIES, "-o", "no/such/folder.jsonl"], 2, "there is no folder"),
        ([*SMALL, POLICIES, "--html", "no/such/folder.html"], 2, "there is no folder"),
        ([*SMALL, POLICIES, "--device", "gpu"], 2, "neither auto, cpu nor cuda"),
        ([*SMALL, f"{MODE}=tf32", POLICIES, "--device", "cpu"], 3, "needs a CUDA device"),
        (["--from", "no.jsonl"], 2, "there is no"),
        (["tiny", "--from", "no.jsonl", "--resume"], 2, "takes no tiny, --resume"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    arguments: list[str], code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = compare(*arguments)
    assert (done.code, done.out) == (code, "")
    assert told in done.err
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_events_that_are_there_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    events = tmp_path / "board" / "01-none" / "events.out.tfevents.1"
    events.parent.mkdir(parents=True)
    events.touch()
    done = compare(*SMALL, POLICIES, "--predict", "--tensorboard", str(tmp_path / "board"))
    assert done.code == 2
    assert "exists already" in done.err


@pytest.mark.slow
def test_ctrl_c_prints_what_is_there_and_how_to_go_on(tmp_path: Path) -> None:
    words = ["compare", "gpt2", POLICIES, f"{MODE}=fp32,bf16-mixed,bf16,fp16-mixed", "--gpu", "h100"]
    process = start(*words, folder=tmp_path)
    file, deadline = tmp_path / "runs" / "compare-gpt2.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and (not file.exists() or file.read_text().count("\n") < 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert done.code == EXIT_INTERRUPTED, done.err
    assert "8 full fp16-mixed" in done.out
    assert "not run" in done.out
    go_on = shlex.join(["bptool", *words, "-o", "runs/compare-gpt2.jsonl", "--resume"])
    assert done.err.splitlines()[-1] == f"go on with: {go_on}"
    assert "Traceback" not in done.err


def test_json_is_all_that_is_on_stdout(predicted: tuple[Done, Path]) -> None:
    assert json.loads(predicted[0].out)["command"] == "compare"
