"""The command line as a user meets it, in a process of its own or, much faster, inside the test's; and what its tests
share: a text, a folder to work in, and runs that are trained once (pytest reads this file as a plugin)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bptool.cli.main import app
from bptool.hardware import PeakRate

SMALL = (
    *("model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.context_length=32"),
    *("training.micro_batch_size=2", "training.steps=4", "training.device=cpu", "schedule.warmup_steps=2"),
    *("evaluation.sequences=2", "evaluation.sample_tokens=5"),
)
"""A run of milliseconds; `data.source` is the fixture's."""


@dataclass(frozen=True)
class Done:
    """What a finished command left behind."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The `result` of a `--json` document."""
        result: dict[str, Any] = json.loads(self.out)["result"]
        return result


def invoke(*arguments: str) -> Done:
    """Run a command in this process. Whatever it does, it must not end in a traceback or as a defect of ours."""
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    assert done.exit_code != 70, done.output
    return Done(done.exit_code, done.stdout, done.stderr)


def start(
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start a command in a process of its own, on one thread. `before`: what starts it, such as `prlimit`."""
    return subprocess.Popen(
        [*before, sys.executable, "-m", "bptool", *arguments],
        cwd=folder,
        env={**process_environment(), **(environment or {})},
        stdout=stdout,
        stderr=stderr,
        text=True,
    )


def process_environment() -> dict[str, str]:
    """One thread, and the bptool that this test imports."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def run(*arguments: str, folder: Path, environment: Mapping[str, str] | None = None) -> Done:
    """Run a command in a process of its own, to its end."""
    return ended(start(*arguments, folder=folder, environment=environment))


def ended(process: subprocess.Popen[str], timeout: float = 120) -> Done:
    """Wait for a process that `start` started."""
    out, err = process.communicate(timeout=timeout)
    return Done(process.returncode, out or "", err)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of each line of metrics.jsonl that has the tag."""
    return [(line["step"], line[tag]) for line in metrics(run) if tag in line]


def checkpoints(run: Path) -> list[int]:
    """Steps of the finished checkpoints."""
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))


def weights(run: Path) -> bytes:
    """The newest checkpoint's model.safetensors."""
    return (run / "checkpoints" / f"step-{checkpoints(run)[-1]:08d}" / "model.safetensors").read_bytes()


def some_text() -> str:
    """180 kB of Python, the same for every test of one interpreter."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("argparse.py", "ast.py", "heapq.py"))


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
    folder = tmp_path_factory.mktemp("trained")
    settings = ("run.name=done", "training.steps=6", "checkpoint.every=2", "checkpoint.keep=3")
    done = run("train", *SMALL, f"data.source={text}", *settings, folder=folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def done_run(here: Path, trained: Path) -> Path:
    """A copy of that run, as `runs/done` of the current folder."""
    shutil.copytree(trained / "runs", here / "runs")
    return Path("runs/done")
