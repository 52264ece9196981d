"""What a run prints and writes: the JSON contract, metrics, TensorBoard, and a screen that stays clean."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, Command, invoke, metrics, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bptool import __version__
from bptool.config.keys import all_keys

# The public contract: a key that goes or changes its meaning raises schema_version.
TRAIN_KEYS = {
    *("run", "workload", "device", "data", "unit", "parameters_count", "first_step", "total_steps", "status", "steps"),
    *("predicted_peak_bytes", "measured_peak_bytes", "train_loss", "val_loss", "unigram_entropy", "duration_s"),
    *("step_median_s", "tokens_per_s", "mfu", "peak_flops_per_s", "peak_flops_source", "backward_over_forward"),
    *("sample", "checkpoint"),
}
SAMPLE_KEYS = {"run", "step", "seed", "prompt", "text"}
EXPORT_KEYS = {"run", "step", "folder", "family", "files"}
EVERY_STEP = {
    *("train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s", "perf/mfu", "perf/backward_over_forward")
}


def strict(text: str) -> Any:
    """JSON without the NaN and Infinity that Python's own parser lets pass."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def events(run: Path) -> EventAccumulator:
    board = EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    board.Reload()
    return board


class TestJson:
    @pytest.mark.parametrize(
        ("command", "keys"),
        [
            (("train", "runs/done", "training.steps=2", "--json"), TRAIN_KEYS),
            (("sample", "done", "--json"), SAMPLE_KEYS),
            (("export", "done", "exported", "--json"), EXPORT_KEYS),
        ],
    )
    def test_stdout_is_one_document(self, done_run: Path, command: tuple[str, ...], keys: set[str]) -> None:
        done = invoke(*command)
        assert done.code == 0
        document = strict(done.out)
        assert document.keys() == {"schema_version", "command", "bptool_version", "result"}
        assert (document["schema_version"], document["command"]) == (1, command[0])
        assert document["bptool_version"] == __version__
        assert document["result"].keys() == keys

    def test_result_json_is_the_same_document(self, train: Command) -> None:
        done = train("--json")
        assert strict(done.out) == strict(Path("runs/tiny/result.json").read_text())

    def test_its_figures_agree_with_each_other_and_with_the_curves(self, train: Command) -> None:
        result, run = (
            train("--json", "evaluation.every=2", "training.gradient_accumulation_steps=3").result,
            Path("runs/tiny"),
        )
        lines = metrics(run)
        assert result["train_loss"] == lines[-1]["train/loss"]
        assert result["val_loss"] == lines[-1]["val/loss"]
        assert (result["run"], result["status"], result["steps"], result["unit"]) == (
            "runs/tiny",
            "finished",
            4,
            "tokens",
        )
        tokens_per_step = 2 * 32 * 3
        assert tokens_per_step / result["step_median_s"] == pytest.approx(result["tokens_per_s"], rel=0.5)
        assert result["predicted_peak_bytes"] == result["measured_peak_bytes"]
        assert lines[-1]["memory/peak_allocated_gib"] == result["measured_peak_bytes"] / 2**30
        assert result["peak_flops_per_s"] == 1e11
        assert result["sample"].startswith("def ")
        assert result["checkpoint"] == "runs/tiny/checkpoints/step-00000004"

    def test_progress_and_notes_go_to_stderr(self, done_run: Path) -> None:
        done = invoke("train", "--resume", "done", "training.steps=8", "--json")
        strict(done.out)
        for words in ("note: training.steps: 6 -> 8", "predicted peak memory", "step 8/8  loss"):
            assert words in done.err


class TestMetrics:
    def test_a_line_holds_the_step_and_its_tags(self, train: Command) -> None:
        train("evaluation.every=3")
        lines = metrics(Path("runs/tiny"))
        assert [line.pop("step") for line in lines] == [1, 2, 3, 4]
        peak, val = {"memory/peak_allocated_gib"}, {"val/loss"}
        assert [set(line) - EVERY_STEP for line in lines] == [set(), peak, peak | val, peak | val]
        assert all(set(line) > EVERY_STEP or set(line) == EVERY_STEP for line in lines)

    def test_only_every_so_often(self, train: Command) -> None:
        train("logging.every=3", "evaluation.every=0", "training.steps=7")
        assert [line["step"] for line in metrics(Path("runs/tiny"))] == [3, 6, 7]


class TestTensorBoard:
    def test_the_curves_are_those_of_metrics(self, train: Command) -> None:
        train("evaluation.every=2")
        run = Path("runs/tiny")
        board, lines = events(run), metrics(run)
        tags = {tag for line in lines for tag in line} - {"step"}
        assert set(board.Tags()["scalars"]) == tags | {"hparam/train/loss", "hparam/val/loss"}
        for tag in tags:
            written = [(line["step"], pytest.approx(line[tag], rel=1e-6)) for line in lines if tag in line]
            assert [(event.step, event.value) for event in board.Scalars(tag)] == written

    def test_hyper_parameters_are_in_the_runs_own_folder(self, train: Command) -> None:
        train()
        run = Path("runs/tiny")
        assert [path.name for path in run.iterdir() if path.is_dir()] == ["checkpoints"]
        summaries = events(run).SummaryMetadata("_hparams_/session_start_info")
        for key in all_keys():
            assert key.encode() in summaries.plugin_data.content

    def test_samples_are_text(self, train: Command) -> None:
        train("evaluation.sample_every=2")
        samples = events(Path("runs/tiny")).Tensors("sample/text_summary")
        assert [sample.step for sample in samples] == [2, 4]
        assert all(sample.tensor_proto.string_val[0].startswith(b"    def ") for sample in samples)

    def test_histograms_of_gradients_when_asked(self, train: Command) -> None:
        train("logging.gradient_histograms_every=2", "model.tied_embeddings=false")
        board = events(Path("runs/tiny"))
        names = {tag.removeprefix("gradients/") for tag in board.Tags()["histograms"]}
        assert {"embedding.weight", "head.weight", "blocks.0.attention.query.weight"} <= names
        histograms = board.Histograms("gradients/blocks.0.attention.query.weight")
        assert [event.step for event in histograms] == [2, 4]
        assert [event.histogram_value.num for event in histograms] == [32 * 32] * 2

    def test_off(self, train: Command) -> None:
        train("logging.tensorboard=false")
        assert not list(Path("runs/tiny").glob("events.*"))


class TestReport:
    def test_the_answer_is_first_and_the_next_command_last(self, train: Command) -> None:
        lines = train().out.splitlines()
        assert re.fullmatch(r"finished at step 4 of 4 after [\d.]+ ms on cpu", lines[0])
        assert re.fullmatch(r"  loss +[\d.]+ nats/token held out, [\d.]+ in training; [\d.]+ by token .*", lines[2])
        assert lines[-3:] == ["next:", "  bptool sample runs/tiny --tokens 300", "  tensorboard --logdir runs/tiny"]

    def test_its_columns_are_aligned(self, train: Command) -> None:
        block = train().out.split("\n\n")[1].splitlines()
        labels = [re.fullmatch(r"  (\w[\w ]*?)  +(\S.*)", line) for line in block]
        assert all(labels)
        assert len({match.start(2) for match in labels if match}) == 1

    def test_the_next_command_works(self, train: Command) -> None:
        line = next(line for line in train("run.name=a run").out.splitlines() if "bptool sample" in line)
        assert line == "  bptool sample 'runs/a run' --tokens 300"
        assert invoke("sample", "runs/a run", "--tokens", "3").code == 0


def on_a_terminal(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command on a pseudo-terminal of 100 columns: its exit code, and all that it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    terminal = {"TERM": "xterm", **(environment or {})}
    process = start(*arguments, folder=folder, environment=terminal, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    with suppress(OSError):  # how Linux says that the other side is closed
        while piece := os.read(ours, 65536):
            written += piece
    os.close(ours)
    return process.wait(timeout=60), written.decode("utf-8", errors="replace")


class TestTerminal:
    def test_a_bar_that_lives_and_colours_that_can_be_refused(self, tmp_path: Path, text: Path) -> None:
        arguments = ["train", *SMALL, f"data.source={text}", "evaluation.every=2"]
        code, screen = on_a_terminal(tmp_path, *arguments)
        assert code == 0
        assert "\x1b[?25l" in screen  # the bar hides the cursor, and gives it back
        assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l")
        assert re.search(r"\x1b\[(?:\d+;)*3\dm", screen)  # a colour
        assert "4/4" in screen
        assert "step 2  val loss" in screen
        assert "0.00 ms left" not in screen
        assert "\x1b" not in screen[screen.index("finished at step") :]
        assert "\r\n\r\nfinished at step" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)

    @pytest.mark.slow
    def test_no_color(self, tmp_path: Path, text: Path) -> None:
        arguments = ["train", *SMALL, f"data.source={text}"]
        code, screen = on_a_terminal(tmp_path, *arguments, environment={"NO_COLOR": "1"})
        assert code == 0
        assert not re.search(r"\x1b\[(?:\d+;)*[34]\dm", screen)

    def test_elsewhere_there_is_not_one_escape_code(self, train: Command) -> None:
        done = train("evaluation.every=1", "evaluation.sample_every=2", "evaluation.temperature=9")
        assert "\x1b" not in done.out + done.err
        assert done.err.count("val loss") == 4
        assert "sample at step 2\n  | def " in done.err
