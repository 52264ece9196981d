"""`bptool profile` as a user meets it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from command_line import Done, ended, invoke, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bptool.errors import EXIT_INTERRUPTED

SMALL = ("tiny", "model.n_layers=2", "model.d_model=32", "model.n_heads=2", "training.micro_batch_size=2")
FEW = ("--steps", "3", "--warmup", "1", "--device", "cpu")
OWN_MODEL = """
import os
import torch
from torch import nn
from bptool import Workload

def loss(model, batch):
    with open(FILE, "a") as file:
        file.write("x")
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

def net():
    return Workload(
        model=lambda: nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)),
        batch=lambda generator: {"x": torch.randn(8, 16, generator=generator), "y": torch.arange(8) % 4},
        loss=loss,
    )
"""


def profile(*arguments: str) -> Done:
    return invoke("profile", *arguments)


@pytest.fixture(scope="module")
def timed() -> Done:
    """A small model, with recomputation."""
    return profile(*SMALL, *FEW, "activation_checkpoint.policy=full", "--json")


@pytest.fixture
def own_model(tmp_path: Path) -> tuple[str, Path]:
    """A model of the user's, and a file that grows by a letter with each forward."""
    file, counter = tmp_path / "my_net.py", tmp_path / "forwards"
    file.write_text(OWN_MODEL.replace("FILE", repr(str(counter))))
    return f"{file}:net", counter


KEYS = {
    *("flops", "time", "tokens_per_s", "mfu", "hfu", "peak_flops_per_s", "peak_flops_source", "modules", "ops"),
    *("ratio_terms", "recompute_terms", "conventions", "unexplained", "roofline", "predicted", "memory", "warnings"),
    *("finite_differences", "recorder_overhead", "compiled", "extrapolated_from_layers", "assumptions", "interrupted"),
}
WORK = ("forward", "dgrad", "wgrad", "recompute")


class TestContract:
    """The keys of `--json`, and what holds between them."""

    def test_keys(self, timed: Done) -> None:
        assert timed.code == 0, timed.err
        result = timed.result
        assert result.keys() >= KEYS
        assert result["flops"].keys() >= {f"{kind}_flops" for kind in (*WORK, "optimizer")}
        for phase in ("step", "data", "forward", "recompute", "backward", "clip", "optimizer"):
            assert result["time"][phase].keys() == {"median_s", "p10_s", "p90_s", "samples_s"}
            assert len(result["time"][phase]["samples_s"]) == 3
        for module in result["modules"]:
            assert module.keys() >= {"name", "type", *(f"{kind}_flops" for kind in WORK), *(f"{k}_s" for k in WORK)}

    def test_modules_and_ops_add_up_to_the_step(self, timed: Done) -> None:
        result = timed.result
        for kind in WORK:
            total = result["flops"][f"{kind}_flops"]
            assert total > 0
            assert sum(module[f"{kind}_flops"] for module in result["modules"]) == total
            assert sum(op["flops"] for op in result["ops"] if op["kind"] == kind) == total
        assert sum(phase["flops"] for phase in result["phases"]) == sum(result["flops"][f"{k}_flops"] for k in WORK)

    def test_terms_add_up_to_the_ratio(self, timed: Done) -> None:
        result = timed.result
        flops = result["flops"]
        ratio = (flops["dgrad_flops"] + flops["wgrad_flops"]) / flops["forward_flops"]
        assert flops["backward_over_forward"] == ratio
        assert sum(term["excess_over_two"] for term in result["ratio_terms"]) == pytest.approx(ratio - 2, abs=1e-12)

    def test_figures_of_speed_agree(self, timed: Done) -> None:
        result = timed.result
        median = result["time"]["step"]["median_s"]
        assert result["tokens_per_s"] == pytest.approx(result["units_per_step"] / median)
        assert result["hfu"] > 0
        (headline,) = (one for one in result["conventions"] if one["headline"])
        assert headline["mfu"] == result["mfu"]
        done = sum(result["flops"][f"{kind}_flops"] for kind in WORK)
        assert result["hfu"] == pytest.approx(done / median / result["peak_flops_per_s"], rel=1e-6)


class TestAnswers:
    def test_the_answer_comes_first_and_the_next_command_last(self) -> None:
        done = profile(*SMALL, *FEW)
        assert done.code == 0, done.err
        assert " ".join(done.out.split()).startswith(f"{' '.join(SMALL)} on cpu: the backward takes ")
        lines = done.out.splitlines()
        assert lines[-2:] == ["next:", f"  bptool profile {' '.join(SMALL)} --html profile.html --trace profile.json"]

    def test_counted_only(self) -> None:
        done = profile(*SMALL, "--count", "--gpu", "h100", "--json")
        assert done.code == 0, done.err
        result = done.result
        assert (result["time"], result["mfu"], result["finite_differences"], result["gpu"]) == (
            None,
            None,
            None,
            "h100",
        )
        assert result["predicted"]["step_s"] > 0
        assert all(op["duration_s"] is None for op in result["ops"])

    def test_a_counted_step_has_the_flops_of_a_timed_one(self, timed: Done) -> None:
        counted = profile(*SMALL, "activation_checkpoint.policy=full", "--count", "--device", "cpu", "--json")
        for kind in WORK:
            assert counted.result["flops"][f"{kind}_flops"] == timed.result["flops"][f"{kind}_flops"]
        assert counted.result["ratio_terms"] == timed.result["ratio_terms"]

    @pytest.mark.slow
    def test_a_deep_model_is_counted_on_a_laptop(self) -> None:
        done = profile("llama3-405b", "--gpu", "h100", "--count")
        assert done.code == 0, done.err
        assert "blocks.0 to 125" in done.out
        assert done.out.splitlines()[-1] == "  bptool memory-estimate llama3-405b --gpu h100"

    def test_a_users_model(self, own_model: tuple[str, Path]) -> None:
        done = profile(own_model[0], *FEW, "--json")
        assert done.code == 0, done.err
        forward = 2 * 8 * (16 * 64 + 64 * 4)
        assert done.result["flops"]["forward_flops"] == forward
        assert done.result["flops"]["wgrad_flops"] == forward
        assert done.result["flops"]["dgrad_flops"] == 2 * 8 * 64 * 4  # the first layer owes none

    def test_files(self, tmp_path: Path) -> None:
        page, trace, board = tmp_path / "page.html", tmp_path / "trace.json", tmp_path / "board"
        asked = (*SMALL, *FEW, "--html", str(page), "--trace", str(trace), "--tensorboard", str(board))
        done = profile(*asked, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["command"] == "profile"
        assert page.read_text().startswith("<!DOCTYPE html>")
        events = json.loads(trace.read_text())["traceEvents"]
        assert {e["name"] for e in events if e.get("cat") == "phase"} >= {"forward", "backward", "optimizer"}
        assert any(e["ph"] == "s" for e in events)
        assert "ui.perfetto.dev" in done.err
        scalars = EventAccumulator(str(board))
        scalars.Reload()
        assert len(scalars.Scalars("perf/backward_over_forward")) == 3
        for option in ("--html", "--trace", "--tensorboard"):
            refused = profile(*SMALL, *FEW, option, asked[asked.index(option) + 1])
            assert (refused.code, refused.out, "--force" in refused.err) == (2, "", True)
        assert profile(*asked, "--force").code == 0


def test_ctrl_c_prints_what_was_gathered(own_model: tuple[str, Path], tmp_path: Path) -> None:
    target, forwards = own_model
    process = start("profile", target, "--device", "cpu", "--steps", "1000000", folder=tmp_path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not forwards.exists() or forwards.stat().st_size < 300):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert done.code == EXIT_INTERRUPTED, done.err
    said = "".join(done.out.split())  # a long path may be broken anywhere
    assert said.startswith(f"{target}oncpu,interruptedafter")
    assert done.out.splitlines()[-1] == f"  bptool profile {target} --steps 3"
    assert "Traceback" not in done.err


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--steps", "0"], ["--steps 0", "--count"]),
            (["--warmup", "-1"], ["--warmup"]),
            (["--steps", "many"], ["--steps"]),
            (["--device", "tpu"], ["tpu", "cuda", "--gpu"]),
            (["--device", "cpu", "--gpu", "h100"], ["exclude each other"]),
            (["--gpu", "h10"], ["h10", "'h100'"]),
            (["--count", "--trace", "x.json"], ["--trace", "--count"]),
            (["--count", "--tensorboard", "x"], ["--tensorboard", "--count"]),
            (["model.n_haeds=2"], ["model.n_heads"]),
            (["nowhere"], ["nowhere"]),
        ],
    )
    def test_each_is_told_in_a_line(self, arguments: list[str], words: list[str]) -> None:
        done = profile(*arguments)
        assert (done.code, done.out) == (2, "")
        assert [word for word in words if word not in done.err] == [], done.err

    def test_a_page_that_cannot_be_written(self, tmp_path: Path) -> None:
        done = profile(*SMALL, "--count", "--device", "cpu", "--html", str(tmp_path / "no" / "page.html"))
        assert (done.code, "page.html" in done.err) == (2, True)

    def test_a_users_file_that_raises(self, tmp_path: Path) -> None:
        file = tmp_path / "broken.py"
        file.write_text("def net():\n    raise ValueError('no such layer')\n")
        done = profile(f"{file}:net", *FEW)
        assert done.code == 2
        assert "no such layer" in done.err
        assert "line 2" in done.err
