"""What the tests of the command line share: a text, a folder to work in, and runs that are trained once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import SMALL, Done, invoke, some_text

from bptool.hardware import PeakRate

Command = Callable[..., Done]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file to train on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(some_text(), encoding="utf-8")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one; the machine's speed is not measured in it, as that takes a while."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bptool.analysis.train.peak_rate", lambda device, mode: PeakRate(1e11, "a test's figure"))
    return tmp_path


@pytest.fixture
def train(here: Path, text: Path) -> Command:
    """`bptool train` of a small run, in this process: `train("run.name=a", "--json")`."""

    def run_train(*arguments: str) -> Done:
        return invoke("train", *SMALL, f"data.source={text}", *arguments)

    return run_train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with one finished run, `runs/done`, of 6 steps and 3 checkpoints; not to be changed."""
    folder, before = tmp_path_factory.mktemp("trained"), Path.cwd()
    os.chdir(folder)
    try:
        settings = ("run.name=done", "training.steps=6", "checkpoint.every=2", "checkpoint.keep=3")
        done = invoke("train", *SMALL, f"data.source={text}", *settings)
    finally:
        os.chdir(before)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def done_run(here: Path, trained: Path) -> Path:
    """A copy of that run, as `runs/done` of the current folder."""
    shutil.copytree(trained / "runs", here / "runs")
    return Path("runs/done")
