"""Small grids, the file of a user's workloads that go wrong, and which processes are left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bptool import __version__
from bptool.analysis.compare.entries import Header
from bptool.analysis.compare.job import Job, JobKind
from bptool.analysis.question import Question, ask

SMALL = (
    *("model.n_layers=2", "model.d_model=16", "model.n_heads=2", "model.d_ff=32", "model.context_length=16"),
    *("training.micro_batch_size=2", "training.device=cpu", "schedule.warmup_steps=2"),
)
WORKLOADS = """
import os, signal, subprocess, sys, time
import torch
from torch import nn
from bptool import Workload

def plain(loss=None, weight_decay=None):
    return Workload(
        model=lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
        batch=lambda generator: (torch.randn(6, 3, generator=generator), torch.randn(6, 2, generator=generator)),
        loss=loss or (lambda model, batch: (model(batch[0]) - batch[1]).square().mean()),
        blocks=lambda model: [model[0], model[2]],
    )

def noisy():
    print("this is my own output")
    print("and this", file=sys.stderr)
    sys.stdin.read()
    return plain()

def raises():
    def loss(model, batch):
        raise ValueError("no such layer")
    return plain(loss)

def hangs():
    def loss(model, batch):
        child = subprocess.Popen(["sleep", "1000"])
        with open(os.environ["PIDS"], "w") as file:
            file.write(f"{os.getpid()} {os.getppid()} {child.pid}\\n")
        print("about to hang", flush=True)
        while True:
            time.sleep(1)
    return plain(loss)

def killed():
    def loss(model, batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(loss)

def crashes():
    def loss(model, batch):
        print("the last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    return plain(loss)

def leaves():
    def loss(model, batch):
        os._exit(7)
    return plain(loss)

def greedy():
    def loss(model, batch):
        return torch.empty(2**60) * plain().loss(model, batch)
    return plain(loss)

def counting():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(3, 3), 0
        def forward(self, x):
            self.calls += 1
            return (torch.tanh(self.linear(x)) * self.calls).sin()
    workload = plain()
    return Workload(
        model=lambda: nn.Sequential(Counting(), nn.Linear(3, 2)),
        batch=workload.batch, loss=workload.loss, blocks=lambda model: [model[0]],
    )
"""


def workloads(folder: Path) -> Path:
    """The file of the workloads above."""
    file = folder / "strange.py"
    file.write_text(WORKLOADS)
    return file


def job_of(kind: JobKind, target: str, folder: Path, settings: Sequence[str] = (), **more: Any) -> Job:
    return Job(
        kind=kind, target=target, settings=[*settings], device="cpu", folder=str(folder), **{"sequences": 2, **more}
    )


def header_of(rows: Sequence[Mapping[str, Any]], target: str = "tiny", **more: Any) -> Header:
    """A grid's header, of two rounds of two steps."""
    plan = {"warmup": 2, "steps": 2, "rounds": 2, "time_limit_s": 120.0, "overrides": list(SMALL), "reference": 0}
    return Header(
        **{
            "bptool_version": __version__,
            "torch_version": torch.__version__,
            "target": target,
            "axes": {},
            "rows": [dict(row) for row in rows],
            "mode": "measure",
            "device": "cpu",
            "device_name": "a CPU",
            "unit": "tokens",
            **plan,
            **more,
        }
    )


def questions_of(header: Header) -> list[Question | None]:
    return [
        ask(header.target, [*header.overrides, *(f"{k}={v}" for k, v in row.items())], command="compare", device="cpu")
        for row in header.rows
    ]


def left_of(file: Path, seconds: float = 10.0) -> list[int]:
    """Of the processes whose numbers the file holds, those that are still there after so long."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in map(int, file.read_text().split()) if _lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _lives(pid: int) -> bool:
    """A zombie, which only waits for its number to be read, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
