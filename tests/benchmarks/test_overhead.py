"""What logging, metrics and checks cost of a step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from step_seconds import config_of

from bptool.hardware import PeakRate
from bptool.instruments.phase_timer import PhaseTimer
from bptool.instruments.speed import SpeedGauge
from bptool.report.train.metrics_file import MetricsFile
from bptool.report.train.progress import progress_listener
from bptool.report.train.tensorboard import TensorBoard
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer, Phase
from bptool.training.seeds import seed_step
from bptool.training.workload import transformer_workload

pytestmark = pytest.mark.benchmark
TAGS = (
    *("train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s", "perf/mfu"),
    *("perf/backward_over_forward", "memory/peak_allocated_gib"),
)


def _median_s(action: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def test_overhead() -> None:
    """Aim: under 2% of a step. Each part is timed by itself: steadier than the difference of two noisy runs."""
    config, device = config_of("small", 1000, []), torch.device("cpu")
    timer = PhaseTimer(device)
    workload = transformer_workload(config)
    step = build_step(config, workload, device, Announcer([timer]))
    micro_batches = [workload.batch(torch.Generator())]

    def run_step() -> None:
        with step.announcer.phase("step"):
            step(1, micro_batches)

    step_s = _median_s(run_step, 7)
    run_step()
    gradients = [torch.randn_like(p) for p in step.optimizers.parameters]
    gauge = SpeedGauge(timer, PeakRate(1e12, "assumed"), 1e6)
    scalars = dict.fromkeys(TAGS, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        board = TensorBoard(Path(folder), config, 0)
        metrics = MetricsFile(Path(folder) / "metrics.jsonl", 0)
        progress = progress_listener("tokens")
        progress.started(first_step=0, total_steps=10**6)
        costs = {
            "TensorBoard scalars": _median_s(lambda: board.step_done(1, scalars), 200),
            "metrics.jsonl": _median_s(lambda: metrics.step_done(1, scalars), 200),
            "progress": _median_s(lambda: progress.step_done(1, scalars), 200),
            "phase timers": 7 * _median_s(lambda: _one_phase(timer), 200)
            + _median_s(lambda: _gauge(timer, gauge), 200),
            "seeding the step": _median_s(lambda: seed_step(1, 1), 200),
            "gradient norm and check": _median_s(lambda: torch.nn.utils.get_total_norm(gradients).item(), 20),
        }
        for listener in (board, metrics, progress):
            listener.close()
    print(f"\noverhead of a step of {step_s * 1e3:.0f} ms (6 x 384, 256 bytes, batch 16)")
    for name, cost in {**costs, "together": sum(costs.values())}.items():
        print(f"  {name:<26}{cost * 1e3:>9.3f} ms{cost / step_s:>9.2%}")


def _one_phase(timer: PhaseTimer) -> None:
    with timer.phase("clip"):
        pass


def _gauge(timer: PhaseTimer, gauge: SpeedGauge) -> None:
    phases: tuple[Phase, ...] = ("step", "forward", "backward")
    for name in phases:
        with timer.phase(name):
            pass
    gauge.read(4096)
