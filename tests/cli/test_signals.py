"""Ctrl-C and SIGTERM, in a process of its own: save and leave, or leave at once."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import SMALL, Command, checkpoints, curve, ended, invoke, run, start, weights

ENDLESS = ("training.steps=100000", "checkpoint.every=0", "evaluation.every=0", "evaluation.sample_every=0")


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGINT", "SIGTERM"]
)
def test_it_saves_and_a_resume_goes_on_to_the_same_weights(
    number: signal.Signals, train: Command, here: Path, text: Path
) -> None:
    """The schedule is constant, so that the endless run's first steps are those of one that ends there."""
    settings = ["schedule.name=constant", "model.dropout=0.1"]
    everything = (*SMALL, f"data.source={text}", *settings, "run.name=stopped", *ENDLESS)
    process = start("train", *everything, folder=here)
    stopped, unbroken = Path("runs/stopped"), Path("runs/unbroken")
    wait_for(stopped / "metrics.jsonl", process)
    process.send_signal(number)
    done = ended(process)
    assert done.code == 130
    assert f"{number.name}: saving after this step" in done.err
    (steps,) = checkpoints(stopped)
    assert done.out.startswith(f"stopped at step {steps} of 100000 after ")
    assert done.out.endswith("\nnext:\n  bptool train --resume runs/stopped\n")
    assert "nan" not in done.out
    assert invoke("train", "--resume", "stopped", f"training.steps={steps + 5}").code == 0
    train(*settings, "run.name=unbroken", f"training.steps={steps + 5}")
    assert weights(stopped) == weights(unbroken)
    for tag in ("train/loss", "train/lr", "train/grad_norm"):
        assert curve(stopped, tag) == curve(unbroken, tag)


SLOW_STEP = """
import time
import torch
from bptool import Workload

class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()
    @staticmethod
    def backward(context, gradient):
        if type(gradient) is torch.Tensor:  # not while the memory is predicted, with fake ones
            open("in the backward", "w").write("x")
            a = torch.ones(4000, 4000)
            for _ in range(100):
                a @ a
        return gradient

def slow():
    return Workload(
        model=lambda: torch.nn.Linear(2, 2),
        batch=lambda generator: torch.ones(1, 2),
        loss=lambda model, batch: Sleep.apply(model(batch)).mean(),
    )
"""


def test_the_second_one_leaves_at_once_even_in_a_long_step(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_STEP)
    process = start("train", "slow.py:slow", "evaluation.sequences=1", folder=tmp_path)
    wait_for(tmp_path / "in the backward", process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    done = ended(process)
    assert done.code == 130
    assert time.monotonic() - sent < 3
    assert "saving after this step; once more leaves at once" in done.err
    assert "stopped at once" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("seed", range(3))
def test_before_the_first_step_there_is_no_traceback(
    number: signal.Signals, seed: int, tmp_path: Path, text: Path
) -> None:
    """At a random moment: while torch or something else is imported, the text is read, the memory is predicted."""
    process = start(
        "train", *SMALL, f"data.source={text}", *ENDLESS, "data.tokenizer=bpe", "model.vocab_size=300", folder=tmp_path
    )
    wait_for(tmp_path / "runs" / "tiny" / "config.json", process)
    time.sleep(random.Random(seed).uniform(0, 3))
    process.send_signal(number)
    done = ended(process)
    print(f"seed {seed}: {done.err.splitlines()}")
    assert done.code == 130
    assert "Traceback" not in done.err
    assert "error" not in done.err
    if "interrupted" in done.err:
        resumed = run("train", "--resume", "tiny", "training.steps=2", folder=tmp_path)
        assert resumed.code == 0, resumed.err
