"""kill -9 at any moment, resume, and end where a run ends that was never stopped: to the bit."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import SMALL, checkpoints, curve, ended, run, start, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

STEPS, RUNS, KILLS = 30, 4, 5
CURVES = ("train/loss", "train/lr", "train/grad_norm", "val/loss")


def arguments(text: Path) -> list[str]:
    intervals = ("checkpoint.every=3", "evaluation.every=4", "evaluation.sample_every=5")
    random_and_accumulating = ("model.dropout=0.2", "training.gradient_accumulation_steps=2", "optimizer.name=adamw")
    larger = ("model.n_layers=2", "model.d_model=128", "training.micro_batch_size=8")
    every = (*intervals, *random_and_accumulating, *larger)
    return ["train", *SMALL, *every, f"training.steps={STEPS}", f"data.source={text}", "run.name=killed"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(*arguments(text), folder=folder)
    assert done.code == 0, done.err
    return folder / "runs" / "killed"


def steps_logged(run_folder: Path) -> int:
    file = run_folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def killed_when(process: subprocess.Popen[str], ripe: Callable[[], bool]) -> bool:
    """Kill the process as soon as `ripe()`; False where it ended before."""
    deadline = time.monotonic() + 100
    while not ripe() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(1e-4)  # a checkpoint takes milliseconds to write
    process.kill()
    process.communicate()
    return process.returncode == -9


def moments(rng: random.Random, run_folder: Path) -> list[tuple[str, Callable[[], bool]]]:
    """When to kill, in the order of the run: on its way to the first step, after random steps, inside checkpoints."""

    def before_the_first_step(seconds: float) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: time.monotonic() > end or steps_logged(run_folder) > 0

    def after(step: int) -> Callable[[], bool]:
        return lambda: steps_logged(run_folder) >= step

    def writing(step: int) -> Callable[[], bool]:
        folder = run_folder / "checkpoints"
        return lambda: steps_logged(run_folder) >= step and any(folder.glob(".writing-*"))

    first = [("start", before_the_first_step(rng.uniform(0, 5))), ("before the first checkpoint", after(1))]
    kinds = {"after": after, "writing": writing}
    later = sorted((step, kind) for kind in kinds for step in rng.sample(range(3, STEPS), (KILLS - 1) // 2))
    return [rng.choice(first), *((f"{kind} {step}", kinds[kind](step)) for step, kind in later)]


@pytest.mark.parametrize("seed", range(RUNS))
def test_killed_and_resumed_as_if_never_stopped(seed: int, unbroken: Path, tmp_path: Path, text: Path) -> None:
    run_folder, command = tmp_path / "runs" / "killed", arguments(text)
    for what, ripe in moments(random.Random(seed), run_folder):
        was_killed = killed_when(start(*command, folder=tmp_path), ripe)
        print(f"seed {seed}: {'killed' if was_killed else 'ended'} {what}; steps {steps_logged(run_folder)}")
        if (run_folder / "config.json").exists():
            command = ["train", "--resume", "killed"]
    if not (run_folder / "result.json").exists():
        done = ended(start(*command, folder=tmp_path))
        assert done.code == 0, done.err
    assert_equal_runs(run_folder, unbroken)


def test_killed_at_the_last_moment(unbroken: Path, tmp_path: Path, text: Path) -> None:
    """The last checkpoint is there, and the result is not."""
    run_folder = tmp_path / "runs" / "killed"
    process = start(*arguments(text), folder=tmp_path)
    killed_when(process, lambda: STEPS in checkpoints(run_folder))
    (run_folder / "result.json").unlink(missing_ok=True)
    done = run("train", "--resume", "killed", folder=tmp_path)
    assert done.code == 0, done.err
    assert_equal_runs(run_folder, unbroken)


@pytest.mark.parametrize("update", ["stochastic", "master"])
def test_killed_with_bf16_weights(update: str, tmp_path: Path, text: Path) -> None:
    """What is rounded at random, or kept beside the weights, goes on too."""
    command = [*arguments(text), "precision.mode=bf16", f"precision.bf16_update={update}"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    done = run(*command, folder=whole)
    assert done.code == 0, done.err
    run_folder = broken / "runs" / "killed"
    assert killed_when(start(*command, folder=broken), lambda: steps_logged(run_folder) >= STEPS // 2)
    done = run("train", "--resume", "killed", folder=broken)
    assert done.code == 0, done.err
    assert_equal_runs(run_folder, whole / "runs" / "killed")


def assert_equal_runs(run_folder: Path, unbroken: Path) -> None:
    assert weights(run_folder) == weights(unbroken)
    assert [step for step, _ in curve(run_folder, "train/loss")] == list(range(1, STEPS + 1))
    events = EventAccumulator(str(run_folder))
    events.Reload()
    for tag in CURVES:
        expected = curve(unbroken, tag)
        assert curve(run_folder, tag) == expected, tag
        seen = [(event.step, event.value) for event in events.Scalars(tag)]
        assert seen == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected], tag
